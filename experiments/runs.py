"""A run of a study: a process of its own, and what it leaves in its folder.

On Linux the process is forked from the worker, which has imported torch and Lightning once: it starts in 0.04 s instead
of 6 s. So the worker itself must not compute with torch, nor touch a GPU.
"""

import atexit
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from lightning_muon.experiments.hparams import write_start
from lightning_muon.experiments.locks import lock
from lightning_muon.experiments.trial import Trial
from lightning_muon.experiments.workers import SILENT, this_machine

RUNS, OUTPUT = "runs", "output.txt"
DONE = ".done"  # a run that has ended well, and whose result is not in the journal yet
# The exit codes of a run, beside 0.
WENT_BAD = 1  # RunGuard has ended it
RAISED = 70  # with a traceback
AGAIN = 75  # to be started again: an earlier process of the same run has not ended, or its checkpoint is refused
REFUSED = 2  # an error of the user
STOPPED = {130, 143, -signal.SIGINT, -signal.SIGTERM}

Run = Callable[[list[str]], object]

_LOCK = ".lock"
_PATIENCE = 10.0  # seconds for the last process of a killed worker to end; it needs one
_QUIET = (
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
)


def arguments_of(options: dict[str, Any]) -> list[str]:
    """Return the options of a trial as the command line has them; configs come first."""
    configs = options.get("config", ())
    named = [f"--config={config}" for config in ([configs] if isinstance(configs, str) else configs)]
    return named + [f"--{key}={_written(value)}" for key, value in options.items() if key != "config"]


def command_of(arguments: Sequence[str], trial: Trial) -> list[str]:
    """Return the command line of a trial, without what only a study sets."""
    return ["fit", *arguments, *arguments_of(dict(trial.options))]


@dataclass
class Process:
    """The process of a running trial, started by :meth:`start`."""

    trial: Trial
    folder: Path
    place: int
    process: BaseProcess
    curve: list[tuple[int, float]] = field(default_factory=list)  # steps and values of the metric, as far as judged
    pruned: bool = False
    look_at: float = 0.0  # when to look at the metric again

    @classmethod
    def start(
        cls,
        study: Path,
        trial: Trial,
        run: Run,
        arguments: Sequence[str],
        metric: str,
        heartbeat: Path,
        place: int,
        places: int,
    ) -> "Process":
        """Start the process of a trial.

        Args:
            study: The folder of the study.
            trial: What to run.
            run: The command line as a function.
            arguments: What all runs of the study share, of ``fit``.
            metric: What judges the run.
            heartbeat: The file that the worker touches.
            place: Number of the run among those that the worker has at a time.
            places: How many these are.
        """
        command = [
            "fit",
            *(option for option in _QUIET if not _names(arguments, option)),
            *arguments,
            *arguments_of(dict(trial.options)),
            "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
            f"--trainer.logger.save_dir={study / RUNS}",
            "--trainer.logger.name=null",
            f"--trainer.logger.version={trial.name}",
            "--trainer.logger.default_hp_metric=false",
        ]
        folder = study / RUNS / trial.name
        process = process_context().Process(
            target=_main,
            args=(run, command, trial, metric, folder, heartbeat, os.getpid(), place, places),
            name=trial.name,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            process.start()
        return cls(trial, folder, place, process)

    def ask_to_stop(self, signum: int = signal.SIGTERM) -> None:
        """Ask it to save a checkpoint and end."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signum)

    def kill(self) -> None:
        """End it, with the processes that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        self.process.kill()  # before it leads a group

    def has_ended(self) -> bool:
        """Return whether it has ended; it is not waited for yet."""
        # The sentinel of multiprocessing stays open in processes that it has left.
        if not hasattr(os, "waitid"):
            return not self.process.is_alive()
        try:
            return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # multiprocessing has waited for it, at the start of another one
            return True

    def end(self) -> int:
        """Return the exit code of the process, which has ended; end what it has left."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)  # before it is waited for: its id is still its own
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        return -1 if code is None else code

    def last_line(self) -> str:
        """Return the last line of its output."""
        return last_line(self.folder)

    @property
    def _pid(self) -> int:
        return self.process.pid or 0


def last_line(folder: Path) -> str:
    """Return the last line that a run has written."""
    with suppress(OSError), (folder / OUTPUT).open("rb") as output:
        output.seek(max(0, output.seek(0, os.SEEK_END) - 8192))
        return _last_of(output.read())
    return ""


def _last_of(output: bytes) -> str:
    lines = output.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def first_refusal(run: Run, commands: Sequence[list[str]]) -> str | None:
    """Return the error that the first wrong command line gives; ``None`` if all can be parsed.

    They are parsed by the program itself, in a process of its own: it may import anything.
    """
    context = process_context()
    answer, end = context.Pipe(duplex=False)
    process = context.Process(target=_parse, args=(run, commands, end))
    process.start()
    end.close()
    refused: str | None
    try:
        refused = answer.recv()
    except EOFError:
        refused = "the program ended while it read the command line"
    process.join()
    return refused


def process_context() -> Any:
    """Return how processes are made: forked where that is safe."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _names(arguments: Sequence[str], option: str) -> bool:
    key = option.partition("=")[0]
    return any(argument.partition("=")[0] == key for argument in arguments)


# ---- in the process of the run


def _main(
    run: Run,
    command: list[str],
    trial: Trial,
    metric: str,
    folder: Path,
    heartbeat: Path,
    worker: int,
    place: int,
    places: int,
) -> NoReturn:
    code = RAISED
    try:
        if sys.platform != "win32":
            os.setsid()  # Ctrl-C in the terminal is for the worker; and all that this starts ends with it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=_end_with, args=(worker, heartbeat), daemon=True).start()
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_ours(folder):
            os._exit(AGAIN)
        if (folder / DONE).exists():
            os._exit(0)
        resumes = any((folder / "checkpoints").glob("*.ckpt"))  # saved whole, or not at all
        if resumes:
            command.append("--ckpt_path=last")
        else:
            _empty(folder)
            write_start(folder, trial, metric)
        _redirect(folder / OUTPUT)
        _take_a_share(place, places)
        sys.argv = [sys.argv[0], *command]
        atexit._clear()  # what the worker does at its end
        try:
            run(command)
            code = 0
        except SystemExit as error:
            if error.code is not None and not isinstance(error.code, int):
                sys.stderr.write(f"{error.code}\n")
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else RAISED
        atexit._run_exitfuncs()
        if code == 0:
            (folder / DONE).touch()
        elif code == REFUSED and resumes:
            # It was killed after its last checkpoint, from which there is nothing left to train.
            _empty(folder)
            code = AGAIN
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # it is shown, as the end of a program is
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _parse(run: Run, commands: Sequence[list[str]], answer: Connection) -> NoReturn:
    """Answer with the last line of the first command that is refused."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        _write_to_descriptors()
        refused: str | None = None
        for command in commands:
            sys.argv = [sys.argv[0], *command]
            try:
                run([*command, "--print_config"])
            except SystemExit as error:
                refused = None if error.code in {0, None} else "refused" if isinstance(error.code, int) else error.code
            except Exception as error:  # as in the import of the user's module
                refused = f"{type(error).__name__}: {error}"
            if refused == "refused":
                sys.stderr.flush()
                output.seek(0)
                refused = _last_of(output.read())
            if refused:
                break
        answer.send(refused and refused.removeprefix("error: "))
        os._exit(0)


def _end_with(worker: int, heartbeat: Path) -> None:
    """End this process and all that it has started when its worker has ended, or gives no sign of life."""
    seen, since = 0.0, time.monotonic()
    while os.getppid() == worker and time.monotonic() - since < SILENT:
        time.sleep(0.5)
        with suppress(OSError):
            touched = heartbeat.stat().st_mtime
            if touched != seen:
                seen, since = touched, time.monotonic()
    os.killpg(0, signal.SIGKILL)


def _is_ours(folder: Path) -> bool:
    """Return whether no other process is in the folder: one of a killed worker ends within a second.

    Some network file systems keep the locks of a machine that has failed. Its worker was silent for a minute when the
    trial was taken over, and by then its runs have ended by themselves.
    """
    path = folder / _LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # open and locked until the end
    until = time.monotonic() + _PATIENCE
    while not lock(path, descriptor):
        if time.monotonic() > until:
            return os.pread(descriptor, 1000, 0).decode() != this_machine()
        time.sleep(0.05)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, this_machine().encode(), 0)
    return True


def _empty(folder: Path) -> None:
    """Remove what an earlier attempt has left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _redirect(output: Path) -> None:
    """Let all output of this process and of those that it starts go to a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    _write_to_descriptors()


def _write_to_descriptors() -> None:
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115


def _take_a_share(place: int, places: int) -> None:
    """Take this run's part of the cores and the GPUs of the machine."""
    if places == 1:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // places)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch := sys.modules.get("torch"):  # it has read the environment already
        torch.set_num_threads(threads)
    gpus = _gpus()
    if len(gpus) > 1:
        own = gpus[place * len(gpus) // places : (place + 1) * len(gpus) // places] or [gpus[place % len(gpus)]]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
        return listed.stdout.split()
    return []
