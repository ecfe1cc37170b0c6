"""Comparisons from the first run to the outcome, of runs of a few milliseconds: killed, continued, and extended."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_muon.experiments import StudyError
from lightning_muon.experiments.compare import compare, outcome
from lightning_muon.experiments.outcome import Outcome
from lightning_muon.experiments.standings import standings
from tests.experiments.small_runs import FORK, folder_of, kill, options_of, write_scalar

pytestmark = pytest.mark.timeout(60)

NEEDS = {"adamw": 1.0, "moonlight": 0.7, "sgd": 1.5}  # steps for the loss of adamw, relative
BEST = {"adamw": 0.002, "moonlight": 0.08, "sgd": 0.1}


def train(command: list[str]) -> None:
    """Log the loss of a power law; the noise depends on the seed."""
    options = options_of(command)
    name, steps, lr = (
        options["config"].removeprefix("optimizer/"),
        int(options["trainer.max_steps"]),
        float(options["model.optimizer.lr"]),
    )
    noise = random.Random(f"{name} {steps} {options['seed_everything']}").gauss(0, 0.003)  # noqa: S311
    writer = EventFileWriter(str(folder_of(command)))
    write_scalar(
        writer, "val/loss", steps - 1, 1.5 + (steps / 100 / NEEDS[name]) ** -0.5 + (lr / BEST[name] - 1) ** 2 + noise
    )
    writer.close()


def inspect(arguments: Sequence[str]) -> dict[str, Any]:
    rates = [float(one.partition("=")[2]) for one in arguments if one.startswith("--model.optimizer.lr=")]
    found = {"lr": rates[-1] if rates else 0.01, "weight_decay": None, "rates": {}}
    setting = {"task": "a parabola", "device": "paper", "parameters": 1000, "tokens_per_step": 64}
    return {**found, **setting, "steps": 100, "accumulate": 1, "seed": 1}


def compared(
    folder: Path, optimizers: Sequence[str] = ("adamw", "moonlight"), arguments: Sequence[str] = ()
) -> Outcome:
    protocol, records = compare(
        folder, optimizers, arguments, run=train, inspect=inspect, seeds=3, tuned=("lr",), jobs=2
    )
    return outcome(protocol, records, "val/loss")


def plain(found: Outcome) -> list[object]:
    """What must not depend on how often a comparison was killed: all but the times."""
    return [
        (one.name, one.settings, one.tuning, [(run.horizon, run.seed, run.loss) for run in one.runs]) for one in found
    ]


def test_the_ratio_of_steps_is_found(tmp_path: Path) -> None:
    found = {one.name: one for one in standings(compared(tmp_path, list(NEEDS)))}
    for name in ("moonlight", "sgd"):
        steps = found[name].steps
        assert steps is not None
        assert steps.contains(NEEDS[name]), steps
        assert not steps.contains(1), steps
        assert found[name].settings["lr"] == pytest.approx(BEST[name], rel=0.2)


def test_killed_at_random_moments_it_gives_the_same_result(tmp_path: Path) -> None:
    expected = plain(compared(tmp_path / "whole"))
    draw = random.Random(0)  # noqa: S311
    for _ in range(20):
        process = FORK.Process(target=compared, args=(tmp_path / "killed",))
        process.start()
        process.join(draw.uniform(0.01, 0.15))
        if process.exitcode is None:
            kill(process)
    assert plain(compared(tmp_path / "killed")) == expected


def test_an_optimizer_that_is_added_later_runs_alone(tmp_path: Path) -> None:
    first = compared(tmp_path)
    started = sorted((tmp_path / "runs").iterdir())
    times = [folder.stat().st_mtime_ns for folder in started]
    both = compared(tmp_path, ["adamw", "moonlight", "sgd"])
    assert plain(both)[:2] == plain(first)
    assert [folder.stat().st_mtime_ns for folder in started] == times
    with pytest.raises(StudyError, match="give another folder"):
        compared(tmp_path, arguments=["--model.dim=3"])
