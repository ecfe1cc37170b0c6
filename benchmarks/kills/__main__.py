"""Kill runs at random moments of their saves, resume them, and compare them with the run that nobody killed.

``python -m benchmarks.kills`` kills each kind of checkpoint a hundred times. After each kill the checkpoint must load,
be that of one step, and be no older than the last step whose save had returned.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.kills.training import LAST, PROGRESS, read, train
from benchmarks.record import RESULTS, report
from lightning_muon.strategies import DamagedCheckpointError, find_whole

# A process that has imported torch and Lightning starts in 0.04 s; this one computes nothing and has no threads.
_CONTEXT = get_context("fork")

STEPS = 60
TIMEOUT = 60.0  # seconds for a process to save once
AT_THE_START = 0.2  # share of the kills that come before the first save of a process
COLUMNS = [
    "checkpoint",
    "saved by",
    "kills",
    "during a save",
    "torn or mixed",
    "unreadable",
    "lost steps",
    "left behind",
    "chains",
    "bit-equal",
]


@dataclass(frozen=True)
class Subject:
    """What is killed: a kind of checkpoint, on one or two ranks, in a folder on some file system."""

    name: str
    kind: str
    ranks: int = 1
    elsewhere: bool = False


SUBJECTS = (
    Subject("one file", "atomic"),
    Subject("one file, another file system", "atomic", elsewhere=True),
    Subject("folder, 2 ranks", "atomic", ranks=2),
    Subject("one file", "asynchronous"),
    Subject("folder, 2 ranks", "asynchronous", ranks=2),
    Subject("one file, another file system", "Lightning", elsewhere=True),
    Subject("folder, 2 ranks", "Lightning", ranks=2),
)


@dataclass
class Counts:
    """What was found after the kills."""

    kills: int = 0
    during_a_save: int = 0
    torn: int = 0
    unreadable: int = 0
    lost: int = 0
    left: int = 0
    chains: int = 0
    equal: int = 0
    reasons: list[str] = field(default_factory=list)

    def row(self, subject: Subject) -> dict[str, Any]:
        """Return the row of the table."""
        values = (self.kills, self.during_a_save, self.torn, self.unreadable, self.lost, self.left, self.chains)
        return {
            **dict(zip(COLUMNS, (subject.name, subject.kind, *values, self.equal), strict=True)),
            "reasons": self.reasons,
        }


def main(arguments: list[str] | None = None) -> None:
    """Kill each kind, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few kills of each kind, to check that it runs")
    parser.add_argument("--kills", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    kills, steps = (3, 15) if options.quick else (options.kills, STEPS)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for subject in SUBJECTS:
            if (parent := _folder(subject, Path(scratch))) is None:
                print(f"{subject.name}: there is no second file system here (/dev/shm), left out")
                continue
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                counts = kill_often(subject, kills, steps, random.Random(options.seed), Path(folder))  # noqa: S311
            rows.append(counts.row(subject))
            print(f"{subject.name}, {subject.kind}: {counts.kills} kills", flush=True)
    settings = {"steps": steps, "seed": options.seed, "quick": options.quick}
    report("SIGKILL at random moments", rows, COLUMNS, settings, "kills-cpu", options.results)


def _folder(subject: Subject, scratch: Path) -> Path | None:
    """Return where the checkpoints go; ``None`` if there is no file system but that of the temporary folder."""
    if not subject.elsewhere:
        return scratch
    shared = Path("/dev/shm")  # noqa: S108
    return shared if shared.is_dir() and shared.stat().st_dev != scratch.stat().st_dev else None


def kill_often(subject: Subject, kills: int, steps: int, moments: random.Random, folder: Path) -> Counts:
    """Train again and again, killing the processes, until there were enough kills and the last training is complete.

    Args:
        subject: What is killed.
        kills: The least number of kills.
        steps: Of each training.
        moments: Draws the moments.
        folder: Where to train.
    """
    reference = reference_digests(subject.ranks, steps, folder / "straight")
    counts = Counts()
    while counts.kills < kills:
        chain = folder / f"chain_{counts.chains}"
        chain.mkdir()
        while (ended := run_and_kill(subject, steps, moments, chain)) is False:
            counts.kills += 1
            if not examine(chain, reference, counts):
                break  # the chain cannot go on
        counts.chains += 1
        if ended:
            counts.equal += read(chain / LAST) == (steps, reference[steps])
            counts.left += len(unfinished(chain))
        shutil.rmtree(chain)
    return counts


def reference_digests(ranks: int, steps: int, folder: Path) -> dict[int, str]:
    """Train without a kill, and return the digest of the checkpoint after each step."""
    folder.mkdir()
    if not _ends_well(_start(Subject("the training without a kill", "atomic", ranks), steps, folder, digests=True)):
        raise RuntimeError(f"the training failed:\n{(folder / 'output').read_text()[-2000:]}")
    lines = (folder / PROGRESS).read_text().splitlines()
    return {int(step): digest for step, digest in (line.split() for line in lines)}


def run_and_kill(subject: Subject, steps: int, moments: random.Random, folder: Path) -> bool:
    """Start a training and kill it at a random moment; return whether it was complete before."""
    progress = folder / PROGRESS
    progress.write_text("")
    processes = _start(subject, steps, folder)
    if moments.random() < AT_THE_START:
        time.sleep(moments.uniform(0.0, 0.5))
    else:
        times = _announcements(progress, moments.randint(2, max(2, min(8, steps // 4))), processes)
        # At any moment of a step, a save included.
        step_time = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.02
        time.sleep(moments.uniform(0.0, 1.5 * step_time))
    complete = [process.exitcode for process in processes] == [0] * len(processes)
    for process in moments.sample(processes, len(processes)):
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(moments.uniform(0.0, 0.005) if len(processes) > 1 else 0.0)
    for process in processes:
        process.join()
        process.close()
    return complete


def _announcements(progress: Path, count: int, processes: list[Any]) -> list[float]:
    """Wait until steps have been announced, or the processes have ended, and return when each was, in seconds."""
    times: list[float] = []
    limit = time.monotonic() + TIMEOUT
    while len(times) < count and any(p.exitcode is None for p in processes) and time.monotonic() < limit:
        times += [time.monotonic()] * (progress.read_text().count("\n") - len(times))
        time.sleep(0.001)
    return times


def examine(folder: Path, reference: dict[int, str], counts: Counts) -> bool:
    """Look at what a kill has left, and return whether the training can go on from it."""
    last = folder / LAST
    announced = [int(line) for line in (folder / PROGRESS).read_text().split("\n")[:-1]]
    promised = max([0, *announced])
    counts.during_a_save += bool(unfinished(folder))
    try:
        find_whole(last)
        step, digest = read(last) if last.exists() else (0, "")
    except DamagedCheckpointError as error:
        counts.torn += 1
        counts.reasons.append(str(error))
        return False
    except Exception as error:
        counts.unreadable += 1
        counts.reasons.append(f"{type(error).__name__}: {error}")
        return False
    if step and digest != reference[step]:
        counts.torn += 1
        counts.reasons.append(f"step {step} with the tensors of another step")
        return False
    if step < promised:
        counts.lost += promised - step
        counts.reasons.append(f"step {promised} was saved, {step} is there")
    return True


def unfinished(folder: Path) -> list[Path]:
    """Return what a killed save has left."""
    return [path for path in folder.iterdir() if path.name.endswith((".saving", ".replaced"))]


def _start(subject: Subject, steps: int, folder: Path, *, digests: bool = False) -> list[Any]:
    port = _free_port() if subject.ranks > 1 else 0
    processes = [
        _CONTEXT.Process(target=train, args=(folder, steps, subject.kind, rank, subject.ranks, port, digests))
        for rank in range(subject.ranks)
    ]
    for process in processes:
        process.start()
    return processes


def _ends_well(processes: list[Any]) -> bool:
    for process in processes:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
        process.close()
    return codes == [0] * len(codes)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
