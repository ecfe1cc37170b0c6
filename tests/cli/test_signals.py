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


def end(processes: Sequence[Running], seconds: float) -> list[int | None]:
    """Wait for all processes; as torchrun does, ask the others to end when one has ended with an error."""
    begun = time.monotonic()
    asked = False
    while any(process.code is None for process in processes) and time.monotonic() - begun < seconds:
        if not asked and any(process.code for process in processes):
            asked = True
            for process in processes:
                process.send(signal.SIGTERM)
        time.sleep(0.01)
    return [process.code for process in processes]


def last_checkpoint() -> Path:
    return max(Path().rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime)


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


@contextmanager
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder


def uninterrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, ranks: int = 1) -> list[str]:
    """Train to the end, and return the batches in their order."""
    with in_folder(folder, monkeypatch), ExitStack() as stack:
        processes = begin(stack, "--model.pause=0", *arguments, ranks=ranks)
        assert end(processes, 90) == [0] * ranks, outputs(processes)
        return trained(lines())


def trained(journal: Sequence[str]) -> list[str]:
    return [line for line in journal if line.startswith("train")]


def test_try(tmp_path, monkeypatch):
    expected = uninterrupted(tmp_path / "whole", monkeypatch)
    print(expected)
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "parts")
    for moment in ["train 3", "val 4 1", "train 8", "train 11", "val 16 1"]:
        with ExitStack() as stack:
            processes = begin(stack)
            wait_for(moment, processes)
            processes[0].send(signal.SIGTERM)
            print(moment, processes[0].wait(20), processes[0].output, lines()[-1])
    with ExitStack() as stack:
        processes = begin(stack)
        print(end(processes, 30), outputs(processes))
    assert trained(lines()) == expected
    assert_equal(facts(tmp_path / "parts"), facts(tmp_path / "whole"))
