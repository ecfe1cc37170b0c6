"""Signals at any moment: the run ends in time, with a checkpoint that resumes exactly and the signal's exit code."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.cli import MuonCLI
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


def begin(
    stack: ExitStack,
    *arguments: str,
    ranks: int = 1,
    environment: Callable[[int, int, int], dict[str, str]] = torchrun_environment,
) -> list[Running]:
    """Start the training in the current folder, on each rank as torchrun would, or as another environment says."""
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
                environment=environment(rank, ranks, port) if ranks > 1 else {},
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
        plain.unlink(missing_ok=True)
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
        "best": [float(state["best_model_score"]) for state in best if state["monitor"]],
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
        self.expected = [trained(rank) for rank in range(self.ranks)]
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
        assert [trained(rank) for rank in range(self.ranks)] == self.expected
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
        # Each takes 10 s; that all ranks end at the same step is also in the test of SLURM.
        pytest.param(
            "ddp", [("train 5", signal.SIGTERM, [1]), ("val 12 0", signal.SIGINT, [0, 1])], marks=pytest.mark.slow
        ),
        pytest.param("fsdp2", [("val 4 1", signal.SIGTERM, [0])], marks=pytest.mark.slow),
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


def test_a_second_signal_ends_at_once() -> None:
    with ExitStack() as stack:
        (process,) = begin(stack, "--model.pause=20", "--trainer.num_sanity_val_steps=0")
        wait_for("batch", [process])
        process.send(signal.SIGINT)
        time.sleep(0.5)
        assert process.code is None  # the step is under way
        process.send(signal.SIGINT)
        assert process.wait(2) == 130
        assert process.output.splitlines()[-1] == "SIGINT: finishing the step and saving; again: end at once"
        assert not list(Path().rglob("last*.ckpt"))


def test_a_rank_that_hangs_does_not_keep_the_others_beyond_the_grace() -> None:
    with ExitStack() as stack:
        processes = begin(stack, *RUNS["ddp"][1], "--grace=2", ranks=2)
        wait_for("train 2", processes)
        processes[1].send(signal.SIGSTOP)
        time.sleep(0.3)
        processes[0].send(signal.SIGTERM)
        assert processes[0].wait(6) == 143, outputs(processes)
        output = processes[0].output
        assert output.splitlines()[-1] == (
            "stopped without a checkpoint: the step and its checkpoint took longer than the grace of 2 s"
        )
        assert "Traceback" not in output


def test_when_a_rank_dies_the_others_end() -> None:
    with ExitStack() as stack:
        processes = begin(stack, *RUNS["ddp"][1], ranks=2)
        wait_for("train 2", processes)
        processes[1].send(signal.SIGKILL)
        assert processes[0].wait(20) not in {0, None}, outputs(processes)


def slurm_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What SLURM sets, with a stand-in for scontrol that writes down how it is called."""
    scontrol = Path("bin/scontrol").absolute()
    scontrol.parent.mkdir(exist_ok=True)
    log = Path("scontrol.log").absolute()
    scontrol.write_text(f"#!/bin/sh\necho $* >> '{log}'\n")
    scontrol.chmod(0o755)
    variables = {"JOB_ID": 7, "JOB_NAME": "run", "NTASKS": ranks, "NTASKS_PER_NODE": ranks, "PROCID": rank}
    variables |= {"LOCALID": rank, "NODEID": 0, "NODELIST": "localhost"}
    return {
        **{f"SLURM_{name}": str(value) for name, value in variables.items()},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)},
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }


def test_slurm_requeues_as_before_and_all_ranks_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, "ddp", monkeypatch)
    with ExitStack() as stack:
        processes = begin(stack, *RUNS["ddp"][1], ranks=2, environment=slurm_environment)
        wait_for("train 3", processes)
        for process in processes:
            process.send(signal.SIGUSR1)
            time.sleep(0.03)  # in the middle of another part of the step
        wait_for("train 8", processes)
        assert Path("scontrol.log").read_text() == "requeue 7\n"
        (requeued,) = Path().glob("hpc_ckpt_*.ckpt")
        assert content(requeued)["global_step"] >= 4
        processes[1].send(signal.SIGTERM)
        assert end(processes, patience=10) == [143, 143], outputs(processes)
    training.finish()


def test_a_run_outside_the_main_thread_has_no_handlers(run: Callable[..., MuonCLI]) -> None:
    cli: list[MuonCLI] = []
    thread = threading.Thread(target=lambda: cli.append(run("fit")))
    thread.start()
    thread.join(60)
    assert cli[0].trainer.global_step == 4


def test_handlers_are_given_back(run: Callable[..., MuonCLI]) -> None:
    def state() -> tuple[list[Any], int, int]:
        signal.set_wakeup_fd(wakeup := signal.set_wakeup_fd(-1))
        return [signal.getsignal(signum) for signum in CODES], threading.active_count(), wakeup

    before = state()
    run("fit")
    assert state() == before


EXITING = """
import os, time
from lightning_muon.cli.signals import ending_quietly

class Lasting:  # until the interpreter clears its modules
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"exiting\\n")
        sleep(1)

lasting = Lasting()
with ending_quietly():
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_signal_to_an_interpreter_that_exits_keeps_the_exit_code() -> None:
    with subprocess.Popen([sys.executable, "-c", EXITING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("ready\n", "exiting\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


# Real launches: each process imports torch and Lightning by itself, which takes 5 s of CPU.


@contextmanager
def launched(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a process group of its own, with its output in the file ``output``."""
    Path("training.yaml").write_text(CONFIG)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    with Path("output").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_line(line: str, rank: int = 0, times: int = 1) -> None:
    deadline = time.monotonic() + 90
    while sum(entry.startswith(line) for entry in lines(rank)) < times:
        assert time.monotonic() < deadline, Path("output").read_text()
        time.sleep(0.01)


FIT = ["fit", "--ckpt_path=last", "--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.mark.slow  # four launches of two processes
@pytest.mark.parametrize("receivers", ["launcher", "other rank", "group"])
def test_ranks_that_lightning_starts(receivers: str) -> None:
    with launched(sys.executable, "-m", "signalled_training", *FIT, "--model.pause=0.1") as process:
        wait_for_line("train 2")
        if receivers == "group":
            os.killpg(process.pid, signal.SIGINT)
        elif receivers == "launcher":
            process.send_signal(signal.SIGINT)
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGINT)
        assert process.wait(30) == 130, Path("output").read_text()
        time.sleep(2)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # nobody is left
    output = Path("output").read_text()
    assert "Traceback" not in output
    assert "SIGINT: stopped after step" in output
    assert "signalled_training fit" in output
    assert list(Path().rglob("last.ckpt"))


@pytest.mark.slow  # two launches of torchrun with two processes
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_restarts_from_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    training = Training(tmp_path, "ddp", monkeypatch)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    saved = "--config=every_step.yaml"
    Path("every_step.yaml").write_text(EVERY_STEP)
    with launched(*torchrun, "-m", "signalled_training", *FIT, saved) as process:
        wait_for_line("train 4", rank=1)
        (pid,) = [line.split()[1] for line in lines(1) if line.startswith("pid")]
        os.kill(int(pid), signum)
        assert process.wait(90) == 0, Path("output").read_text()
    output = Path("output").read_text()
    assert "--ckpt_path last: there is no checkpoint yet, the run starts afresh" in output
    assert "--ckpt_path last: logs/run/one/checkpoints/" in output
    if signum == signal.SIGTERM:  # nothing is made twice; after a SIGKILL one step may be
        training.check_whole()
    else:
        assert trained()[-1] == training.expected[0][-1]


EVERY_STEP = """
trainer:
  callbacks+:
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_top_k: 1, filename: every-step}
"""


@pytest.mark.slow  # 40 trainings on each way: minutes
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", RUNS)
def test_signals_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    training = Training(tmp_path, way, monkeypatch)
    draw = random.Random(way)  # noqa: S311 - moments
    seconds: list[float] = []
    endings: dict[str, int] = {}
    complete = 0
    while len(seconds) < 40:
        begun_before = lines().count("begin")
        with training.going_on() as processes:
            for rank in range(training.ranks):
                wait_for("begin", processes, rank=rank, times=begun_before + 1)
            time.sleep(draw.uniform(0.05, 2.5))
            signum = draw.choice(list(CODES))
            receivers = draw.choice([[rank] for rank in range(training.ranks)] + [list(range(training.ranks))])
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
            if "stopped after step" in output:
                kind = "saved"
                assert set(codes) == {CODES[signum]}, output
                assert "Traceback" not in output, output
            elif Path("final.ckpt").exists():
                kind = "after the last step"
            else:
                # Before the first step each rank is on its own: the others are told by torchrun, or by an error.
                kind = "before the first step"
                assert all(codes[rank] == CODES[signum] for rank in receivers), output
                assert 0 not in codes
            endings[kind] = endings.get(kind, 0) + 1
            if Path("final.ckpt").exists():  # so late that all steps were made
                training.check_whole()
                training.begin()
    print(way, f"{len(seconds)} signals, {max(seconds):.1f} s at most, {endings}, {complete} trainings complete")
