"""The runs of a comparison: the same tuning for all, paired seeds, and lengths that bracket the baseline's loss."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_muon.experiments import StudyError
from lightning_muon.experiments.compare import compare, look_at, outcome, protocol_of
from lightning_muon.experiments.contestant import Contestant, Settings
from lightning_muon.experiments.journal import Record
from lightning_muon.experiments.outcome import Setting
from lightning_muon.experiments.protocol import Protocol
from lightning_muon.experiments.trial import Result, Trial

STEPS = 300
NEEDS = {"adamw": 1.0, "muon": 0.7, "far": 0.2, "sgd": 1.6}  # steps for the loss of adamw, relative
CONTESTANTS = [Contestant(name, (f"optimizer/{name}",), Settings(0.01, 0.1)) for name in NEEDS]


def loss(trial: Trial) -> float:
    """Return the loss of a trial: of a power law in its steps, with a bowl around a learning rate of 0.02."""
    name = trial.name.partition(",")[0]
    lr = trial.options["model.optimizer.lr"]
    away = math.log2(lr / 0.02) ** 2 / 100
    return 1.5 + 5 * (trial.options["trainer.max_steps"] / STEPS / NEEDS[name]) ** -0.5 + away


def complete(protocol: Protocol, pick: Callable[[list[Trial]], Trial] = lambda trials: trials[0]) -> list[Record]:
    """Run trial after trial to the end of the study."""
    records: list[Record] = []
    while trials := protocol.plan(records):
        trial = pick(trials)
        records.append(
            Record(trial, "finished", "w", Result("finished", loss(trial), trial.options["trainer.max_steps"]))
        )
    return records


def lengths(records: Sequence[Record], name: str, seed: int) -> list[int]:
    """Return the lengths of the runs of an optimizer with a seed."""
    trials = [record.trial for record in records if record.trial.name.startswith(f"{name},")]
    return [trial.options["trainer.max_steps"] for trial in trials if trial.options["seed_everything"] == seed]


PROTOCOL = Protocol(tuple(CONTESTANTS), STEPS, 2, 42, (43, 44), ("lr", "weight_decay"))


def test_all_are_tuned_by_the_same_runs_and_trained_with_the_same_seeds() -> None:
    records = complete(PROTOCOL)
    tuned = {name: lengths(records, name, 42) for name in NEEDS}
    assert set(map(tuple, tuned.values())) == {(STEPS,) * len(tuned["adamw"])}
    assert lengths(records, "adamw", 43) == lengths(records, "adamw", 44) == [300, 212, 150]
    # Worse than the baseline, whose own shorter runs reach its loss.
    assert lengths(records, "sgd", 43) == [300]
    # Better: shorter, until its loss is clearly above the baseline's.
    assert lengths(records, "muon", 43) == [300, 212, 150]
    assert lengths(records, "far", 43) == [300, 212, 150, 106, 75]


def test_each_run_ends_a_schedule_of_its_own_length_and_is_judged_there() -> None:
    for record in complete(PROTOCOL):
        options = record.trial.options
        assert options["trainer.val_check_interval"] == 2 * options["trainer.max_steps"]
        assert options["trainer.check_val_every_n_epoch"] is None
        assert f"steps={options['trainer.max_steps']},seed={options['seed_everything']}" in record.trial.name


def test_the_order_of_the_results_does_not_matter() -> None:
    expected = {record.trial.name for record in complete(PROTOCOL)}
    draw = random.Random(0)  # noqa: S311
    for _ in range(3):
        records = complete(PROTOCOL, draw.choice)
        assert {record.trial.name for record in records} == expected
        assert len(records) == len(expected)


def test_what_runs_is_not_asked_for_again() -> None:
    first = PROTOCOL.plan([])
    running = [Record(trial, "running", "w") for trial in first]
    assert PROTOCOL.plan(running[:-1]) == first[-1:]
    assert PROTOCOL.plan(running) == []


def test_the_outcome_has_the_settings_found_and_all_runs() -> None:
    records = complete(PROTOCOL)
    found = outcome(PROTOCOL, records, "val/loss")
    assert found.baseline == "adamw"
    assert [finalist.name for finalist in found] == list(NEEDS)
    for finalist in found:
        assert finalist.settings["lr"] == pytest.approx(0.02, rel=0.02)
        assert len(finalist.tuning) == sum(
            record.trial.name.startswith(f"{finalist.name},") for record in records
        ) - len(finalist.runs)
        assert {run.seed for run in finalist.runs} == {43, 44}
    assert sum(len(finalist.tuning) + len(finalist.runs) for finalist in found) == len(records)
    early = outcome(PROTOCOL, [], "val/loss")
    assert [finalist.runs for finalist in early] == [()] * len(NEEDS)


def inspector(changes: Mapping[str, Mapping[str, Any]]) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Return what reads settings off command lines: of ``adamw`` all rates follow lr, of ``polar`` none does."""

    def inspect(arguments: Sequence[str]) -> dict[str, Any]:
        configs = [one.removeprefix("--config=") for one in arguments if one.startswith("--config=optimizer/")]
        rates = [float(one.partition("=")[2]) for one in arguments if one.startswith("--model.optimizer.lr=")]
        lr = rates[-1] if rates else 0.01
        name = configs[-1].removeprefix("optimizer/")
        found = {"lr": lr, "weight_decay": 0.1, "rates": {"head": 0.005 if name == "polar" else lr}}
        run = {"steps": 300, "accumulate": 1, "seed": 7, "task": "x on y", "device": "paper"}
        run |= {"parameters": 1000, "tokens_per_step": None}
        return {**found, **run, **changes.get(name, {})}

    return inspect


def test_a_protocol_is_made_of_what_the_command_lines_say() -> None:
    found = {name: look_at(name, ["--trainer.max_steps=300"], inspector({})) for name in ("adamw", "polar")}
    protocol = protocol_of(found, 3, ("lr",))
    assert [one.coupled for one in protocol.contestants] == [frozenset({"head"}), frozenset()]
    assert [one.configs for one in protocol.contestants] == [("optimizer/adamw",), ("optimizer/polar",)]
    assert (protocol.tuning_seed, protocol.seeds, protocol.steps) == (7, (8, 9, 10), 300)
    assert protocol.setting == Setting("x on y", parameters=1000, device="paper")


@pytest.mark.parametrize(
    ("optimizers", "options", "changes", "message"),
    [
        (["adamw"], {}, {}, "needs two optimizers at least"),
        (["adamw", "adamw"], {}, {}, "named twice"),
        (["adamw", "polar"], {"seeds": 1}, {}, "two seeds at least"),
        (["adamw", "polar"], {"tuned": ("lr", "heads")}, {}, "not know heads; it knows each_role, head, lr, roles"),
        (["adamw", "polar"], {}, {"polar": {"steps": 20}}, "steps is 300 with adamw and 20 with polar"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    optimizers: list[str], options: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=message):
        compare(tmp_path, optimizers, [], run=print, inspect=inspector(changes), **options)
