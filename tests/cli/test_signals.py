"""Signals at any moment: the run ends in time, with a checkpoint that resumes exactly, and the exit code of the signal."""

import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.strategies import consolidate_checkpoint
from tests.processes import Running, free_port, torchrun_environment

pytestmark = pytest.mark.timeout(170)

HERE = Path(__file__).parent
CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_steps: 18  # three epochs
  val_check_interval: 4
  accumulate_grad_batches: 2
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: logs, name: run, version: one}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {save_last: true, monitor: val/loss, save_top_k: 2, filename: "{step}"}
"""
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def begin(stack: ExitStack, *arguments: str, ranks: int = 1) -> list[Running]:
    """Start the training in the current folder, on each rank as torchrun would."""
    Path("training.yaml").write_text(CONFIG)
    port = free_port()
    options = ["fit", "--ckpt_path=last", f"--trainer.devices={ranks}", *arguments]
    return [
        stack.enter_context(
            Running(
                "signalled_training",
                *options,
                folder=Path.cwd(),
                path=[HERE],
                environment=torchrun_environment(rank, ranks, port) if ranks > 1 else {},
            )
        )
        for rank in range(ranks)
    ]


def lines(rank: int = 0) -> list[str]:
    journal = Path(f"journal.{rank}")
    return journal.read_text().splitlines() if journal.exists() else []


def wait_for(line: str, processes: Sequence[Running], rank: int = 0, times: int = 1) -> None:
    """Wait until the journal has lines that begin like this."""
    deadline = time.monotonic() + 60
    while sum(entry.startswith(line) for entry in lines(rank)) < times:
        assert time.monotonic() < deadline, outputs(processes)
        assert processes[rank].code is None, outputs(processes)
        time.sleep(0.005)


def outputs(processes: Sequence[Running]) -> str:
    return "\n".join(f"--- rank {rank}: {process.code}\n{process.output}" for rank, process in enumerate(processes))


def end(processes: Sequence[Running], seconds: float = 30, patience: float = 0) -> list[int | None]:
    """Wait for all processes, and return their exit codes.

    Like torchrun, ask the others to end when one has ended with an error; patience: how many seconds later.
    """
    deadline, failed_at = time.monotonic() + seconds, None
    while any(process.code is None for process in processes) and time.monotonic() < deadline:
        if failed_at is None and any(process.code for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() >= failed_at + patience:
            for process in processes:
                process.send(signal.SIGTERM)
            failed_at = float("inf")
        time.sleep(0.01)
    return [process.code for process in processes]


def content(path: Path) -> dict[str, Any]:
    if path.is_dir():
        plain = path.with_suffix(".plain")
        consolidate_checkpoint(path, plain)
        path = plain
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def facts(folder: Path) -> dict[str, Any]:
    """What two runs that are the same have in common: all but paths, times and the way there."""
    loaded = content(folder / "final.ckpt")
    best = [state for name, state in loaded["callbacks"].items() if name.startswith("ModelCheckpoint")]
    return {
        "weights": loaded["state_dict"],
        "optimizer": loaded["optimizer_states"],
        "schedule": loaded["lr_schedulers"],
        "step": loaded["global_step"],
        "epoch": loaded["epoch"],
        "best": [float(state["best_model_score"]) for state in best],
    }


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_equal(value, other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for position, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{position}]")
    else:
        assert one == other, where


def trained(rank: int = 0) -> list[str]:
    """The steps in their order, each with its batch, its loss and its learning rate."""
    return [line for line in lines(rank) if line.startswith("train")]


RUNS = {"one": (1, []), "ddp": (2, ["--trainer.strategy=ddp"]), "fsdp2": (2, ["--trainer.strategy=fsdp2"])}


class Training:
    """A training that is interrupted again and again, beside one that is not.

    Args:
        folder: Where both write.
        way: One of ``RUNS``.
        monkeypatch: To go into the folder.
    """

    def __init__(self, folder: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.ranks, self._arguments = RUNS[way]
        self._enter("whole")
        with self.going_on("--model.pause=0") as processes:
            assert end(processes) == [0] * self.ranks, outputs(processes)
        self._expected = [trained(rank) for rank in range(self.ranks)]
        self._chains = 0
        self.begin()

    def begin(self) -> None:
        """Begin anew."""
        self._chains += 1
        self._enter(f"parts {self._chains}")

    def _enter(self, name: str) -> None:
        (self.folder / name).mkdir()
        self._monkeypatch.chdir(self.folder / name)

    @contextmanager
    def going_on(self, *arguments: str) -> Iterator[list[Running]]:
        """Start it, or go on from its newest checkpoint."""
        with ExitStack() as stack:
            yield begin(stack, *self._arguments, *arguments, ranks=self.ranks)

    def check_whole(self) -> None:
        """Check that all parts together are what the uninterrupted training is, to the bit."""
        assert [trained(rank) for rank in range(self.ranks)] == self._expected
        assert_equal(facts(Path()), facts(self.folder / "whole"))

    def finish(self) -> None:
        """Go on to the end, and check the whole."""
        with self.going_on() as processes:
            assert end(processes) == [0] * self.ranks, outputs(processes)
        self.check_whole()


@pytest.mark.parametrize(
    ("way", "moments"),
    [
        ("one", [("train 3", signal.SIGTERM, [0]), ("val 4 1", signal.SIGINT, [0]), ("train 12", signal.SIGINT, [0])]),
        ("ddp", [("train 5", signal.SIGTERM, [1]), ("val 12 0", signal.SIGINT, [0, 1])]),
        ("fsdp2", [("val 4 1", signal.SIGTERM, [0])]),
    ],
)
def test_a_signal_ends_all_ranks_after_a_step_and_the_run_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, moments: list[tuple[str, signal.Signals, list[int]]]
) -> None:
    training = Training(tmp_path, way, monkeypatch)
    for moment, signum, receivers in moments:
        with training.going_on() as processes:
            wait_for(moment, processes, rank=receivers[0])
            for rank in receivers:
                processes[rank].send(signum)
            begun = time.monotonic()
            assert end(processes, patience=10) == [CODES[signum]] * training.ranks, outputs(processes)
            assert time.monotonic() - begun < 10
            output = outputs(processes)
        assert "Traceback" not in output
        assert f"{signum.name}: stopped after step" in output
        assert "--ckpt_path logs/run/one/checkpoints/last.ckpt" in output
    training.finish()


@pytest.mark.slow  # 40 trainings on each way: minutes
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", RUNS)
def test_signals_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    training = Training(tmp_path, way, monkeypatch)
    draw = random.Random(way)
    seconds: list[float] = []
    endings: dict[str, int] = {}
    complete = 0
    while len(seconds) < 40:
        with training.going_on() as processes:
            wait_for("begin", processes, times=sum(line == "begin" for line in lines()) + 1)
            time.sleep(draw.uniform(0, 2.5))
            signum = draw.choice(list(CODES))
            receivers = draw.choice([[rank] for rank in range(training.ranks)] + [list(range(training.ranks))])
            early = not any(line.startswith("train") for line in lines()[-3:])
            sent = [processes[rank].code is None for rank in receivers]
            for rank in receivers:
                processes[rank].send(signum)
            begun = time.monotonic()
            codes = end(processes, patience=draw.choice([0, 3]))
            output = outputs(processes)
            if codes == [0] * training.ranks:
                training.check_whole()
                training.begin()
                complete += 1
                continue
            assert all(sent), output
            seconds.append(time.monotonic() - begun)
            assert None not in codes, output
            kind = "saved" if "stopped after step" in output else "last step" if "after the last" in output else "early"
            kind += "" if set(codes) == {CODES[signum]} else f" {codes} to {receivers} {signum}"
            kind += " TRACEBACK" if "Traceback" in output else ""
            endings[kind] = endings.get(kind, 0) + 1
            if "TRACEBACK" in kind or "to" in kind:
                print(kind, early, output)
            if "after the last" in output:
                training.check_whole()
                training.begin()
    print(way, f"{len(seconds)} signals, {max(seconds):.1f} s at most, {endings}, {complete} trainings complete")
