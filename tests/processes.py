"""Start processes quickly: run a function on several ranks, or ``python -m module``, in forks of one server.

The server is started by the first call. It imports torch and Lightning once (4 s of CPU); a process forked from it
starts in 0.04 s. It imports nothing of this repository, so that each process takes ``lightning_muon`` from the folder
that its caller names.
"""

import atexit
import contextlib
import faulthandler
import importlib
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "lightning.pytorch.cli",
        "omegaconf",
        "pytest",  # each process imports the main module of its parent
        "rich.table",
        "tensorboard.backend.event_processing.event_accumulator",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.utils.tensorboard",
    ]
)

TIMEOUT = 150.0  # seconds; below pytest's own, so that a hang ends with the output of the ranks
_GRACE = 2.0  # seconds; how long the other ranks may still fail by themselves after the first
_COLLECTIVE_TIMEOUT = timedelta(seconds=120)
_OUTPUT = 6000  # characters of each rank that a failure shows


def launch(
    program: Path,
    function: str,
    world_size: int,
    *arguments: Any,
    folder: Path | None = None,
    path: Sequence[Path] = (),
    process_group: bool = True,
    timeout: float = TIMEOUT,
) -> list[Any]:
    """Call a function of a Python file on several ranks of a gloo group, and return its results by rank.

    Args:
        program: The file. Its folder comes first on the import path of the ranks.
        function: Its name, or ``"check_*"`` for all functions of that name that are meant for this number of ranks (an
            attribute ``world_sizes`` of a function restricts it).
        world_size: Number of ranks.
        arguments: Of the function; they must be picklable, and so must its result.
        folder: Working directory of the ranks; a temporary one if left out.
        path: Further folders for the import path.
        process_group: Initialize torch.distributed with a file store. If false, the program does, by the environment
            variables that ``torchrun`` would set (they are always set).
        timeout: Seconds for all of it.

    Raises:
        AssertionError: If a rank fails or the time is over. Shows the output of the ranks with their tracebacks.
    """
    with tempfile.TemporaryDirectory() as scratch:
        port = free_port()
        outputs = [Path(scratch, f"output.{rank}") for rank in range(world_size)]
        results = [Path(scratch, f"result.{rank}") for rank in range(world_size)]
        processes = [
            _process(
                outputs[rank],
                None,
                {**os.environ, **torchrun_environment(rank, world_size, port)},
                folder or Path(scratch),
                [program.parent, *path],
                timeout,
                _run_rank,
                (program.stem, function, arguments, results[rank], Path(scratch, "store") if process_group else None),
            )
            for rank in range(world_size)
        ]
        codes = _exit_codes(processes, timeout)
        if codes != [0] * world_size:
            reports = [
                f"--- rank {rank} of {world_size}, {_ending(code)}\n{output.read_text(errors='replace')[-_OUTPUT:]}"
                for rank, (code, output) in enumerate(zip(codes, outputs, strict=True))
            ]
            raise AssertionError(f"{program.name}, {function}:\n" + "\n".join(reports))
        return [pickle.loads(result.read_bytes()) for result in results]  # noqa: S301 - written by the ranks


def run_module(
    module: str,
    *arguments: str,
    folder: Path,
    path: Sequence[Path] = (),
    environment: dict[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module arguments`` in a folder, and return its exit code and what it wrote.

    Args:
        module: The module.
        arguments: Of its command line.
        folder: Working directory, first on the import path.
        path: Further folders for the import path.
        environment: Variables to set.
        timeout: Seconds; the process is killed after it, with the exit code -9.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        variables = {**os.environ, **(environment or {})}
        process = _process(out, err, variables, folder, [folder, *path], timeout, _run_module, (module, arguments))
        (code,) = _exit_codes([process], timeout)
        written = (file.read_text(errors="replace") for file in (out, err))
        return subprocess.CompletedProcess([module, *arguments], -9 if code is None else code, *written)


class Running:
    """A ``python -m module arguments`` that goes on while a test does something to it; a context manager.

    Args:
        module: The module.
        arguments: Of its command line.
        folder: Working directory, first on the import path.
        path: Further folders for the import path.
        environment: Variables to set.
        timeout: Seconds after which it shows where it is.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        folder: Path,
        path: Sequence[Path] = (),
        environment: dict[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._output = Path(self._scratch.name, "output")
        variables = {**os.environ, **(environment or {})}
        self._process = _process(
            self._output, None, variables, folder, [folder, *path], timeout, _run_module, (module, arguments)
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._scratch.cleanup()

    @property
    def code(self) -> int | None:
        """The exit code; negative if a signal has killed it; ``None`` while it runs."""
        code: int | None = self._process.exitcode
        return code

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def send(self, signum: int) -> None:
        """Send a signal, if it still runs."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, but this is not reported yet
                os.kill(self._process.pid, signum)

    def wait(self, timeout: float) -> int | None:
        """Wait for the end, but not longer than that many seconds; return the exit code."""
        self._process.join(timeout)
        return self.code


def torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that ``torchrun`` sets for one of its processes on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "1",
    }


def _process(
    output: Path,
    errors: Path | None,
    environment: dict[str, str],
    folder: Path,
    path: list[Path],
    timeout: float,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Any:
    """Start a process that calls the target and exits with the code of its SystemExit."""
    process = _CONTEXT.Process(
        target=_main, args=(output, errors, environment, folder, path, timeout, target, arguments)
    )
    process.start()
    return process


def _exit_codes(processes: list[Any], timeout: float) -> list[int | None]:
    """Wait for the processes; kill what is left at the end, or shortly after one has failed. None: it was killed."""
    deadline = time.monotonic() + timeout + _GRACE
    failed = False
    try:
        while (running := [p.sentinel for p in processes if p.exitcode is None]) and time.monotonic() < deadline:
            wait(running, max(0.0, deadline - time.monotonic()))
            if not failed and any(p.exitcode for p in processes):
                failed, deadline = True, min(deadline, time.monotonic() + _GRACE)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def _ending(code: int | None) -> str:
    return "stopped: its time was over, or another rank had failed" if code is None else f"exit code {code}"


def free_port() -> int:
    """Return a port that nobody uses just now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


# From here on: in the process.


def _main(
    output: Path,
    errors: Path | None,
    environment: dict[str, str],
    folder: Path,
    path: list[Path],
    timeout: float,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Make the process one of its own: its output, environment, folder and import path; then call the target."""
    import torch

    with output.open("wb") as out, (errors or output).open("ab") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    faulthandler.enable(file=2)
    faulthandler.dump_traceback_later(timeout, file=2)
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if not name.startswith("PYTEST_")})
    os.chdir(folder)
    # A generated project has a folder ``tests`` of its own.
    sys.path[:] = [*map(str, path), *(entry for entry in sys.path if entry not in ("", str(REPOSITORY)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    torch.set_num_threads(1)
    # Workers of a DataLoader are children of this process, as elsewhere, and end with it. Those of a server would stay.
    set_start_method("fork", force=True)
    code = 0
    try:
        target(*arguments)
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # gloo's threads may abort a process whose interpreter ends


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _run_rank(module: str, function: str, arguments: tuple[Any, ...], result: Path, store: Path | None) -> None:
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if store:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    program = importlib.import_module(module)
    if function == "check_*":
        for name, check in list(vars(program).items()):  # a warning adds to it
            if name.startswith("check_") and world_size in getattr(check, "world_sizes", (world_size,)):
                with _named(name):
                    check()
        value = None
    else:
        value = getattr(program, function)(*arguments)
    result.write_bytes(pickle.dumps(value))
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while others still send
        dist.destroy_process_group()


@contextlib.contextmanager
def _named(check: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(f"{check} failed:", file=sys.stderr)
        raise


def _run_module(module: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
