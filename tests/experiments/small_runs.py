"""Runs of a few milliseconds that write what a training writes; and workers of studies of them."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_muon.experiments import Plan, Record, Trial, run_study

STEPS = 4
FORK = get_context("fork")


def options_of(command: Sequence[str]) -> dict[str, str]:
    """Return the options of a command line by their keys."""
    return {option.partition("=")[0].lstrip("-"): option.partition("=")[2] for option in command[1:]}


def folder_of(command: Sequence[str]) -> Path:
    """Return the folder of a run."""
    options = options_of(command)
    return Path(options["trainer.logger.save_dir"], options["trainer.logger.version"])


def write_scalar(writer: EventFileWriter, tag: str, step: int, value: float) -> None:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.flush()


def train(command: list[str]) -> None:
    """Log a loss in 4 steps that depends on the learning rate; save a checkpoint after each, and resume from it.

    A second file counts the attempts, and how often each step was made.
    """
    folder, options = folder_of(command), options_of(command)
    assert command[0] == "fit"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    resumes = options.get("ckpt_path") == "last"
    assert resumes == checkpoint.exists()
    done = int(checkpoint.read_text()) if resumes else 0
    counts = folder.parent.parent / f"{folder.name}.attempts"
    with counts.open("a") as file:
        file.write(f"{os.getpid()}\n")
    writer = EventFileWriter(str(folder))
    for step in range(done + 1, STEPS + 1):
        time.sleep(float(options.get("seconds", 0.004)))
        write_scalar(writer, "val/loss", step - 1, loss(float(options["lr"]), step))
        checkpoint.parent.mkdir(exist_ok=True)
        unfinished = checkpoint.with_suffix(".unfinished")
        unfinished.write_text(str(step))
        unfinished.replace(checkpoint)
    writer.close()


def loss(lr: float, step: int) -> float:
    return (lr - 0.02) ** 2 * 1000 + 1 / step


def trials(count: int) -> list[Trial]:
    return [Trial(f"lr=0.0{number}", {"lr": float(f"0.0{number}")}) for number in range(1, count + 1)]


def plan_of(count: int) -> Plan:
    return lambda _: trials(count)


def two_rounds(records: Sequence[Record]) -> list[Trial]:
    """A plan that goes on: three trials, then two around the best of these."""
    first = trials(3)
    done = [record for record in records[:3] if record.result]
    if len(done) < 3:
        return first
    best = min(done, key=lambda record: record.result.loss).trial.options["lr"]
    return [*first, *(Trial(f"lr={best * by:.3f}", {"lr": round(best * by, 3)}) for by in (0.8, 1.25))]


def work(folder: Path, plan: object, run: object = train, **options: object) -> None:
    """Be a worker; for a process of its own."""
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    run_study(folder, {}, plan, run, **options)


def start(folder: Path, plan: object, run: object = train, **options: object) -> object:
    """Start a worker in a process of its own."""
    process = FORK.Process(target=work, args=(folder, plan, run), kwargs=options)
    process.start()
    return process


def kill(process: object) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def await_files(folder: Path, pattern: str, count: int) -> list[Path]:
    """Wait until there are so many files of a pattern."""
    until = time.monotonic() + 20
    while len(found := list(folder.glob(pattern))) < count:
        assert time.monotonic() < until, f"no {count} files {pattern}"
        time.sleep(0.01)
    return found
