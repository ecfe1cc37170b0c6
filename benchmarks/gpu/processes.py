"""Run each section in its own process, which may fail, hang or break its CUDA context without harm to the others."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu.measuring import Measuring, Row, SkippedError

Section = Callable[[Measuring], None]
Receive = Callable[[str, Row], object]
# Seconds after its deadline at which a section is killed: one measurement may still be on its way.
GRACE = 20.0


def run_section(section: Section, device: str, tiny: bool, deadline: float, kill_at: float, receive: Receive) -> str:
    """Run a section in a process, and return how it ended.

    Args:
        section: The function.
        device: See :class:`~benchmarks.gpu.measuring.Measuring`.
        tiny: See there.
        deadline: See there.
        kill_at: Value of ``time.time()`` at which the process is killed.
        receive: Called with each of its messages.

    Returns:
        ``"ok"``, ``"skipped: <reason>"`` or ``"failed: <reason>"``.
    """
    # A process that has used CUDA cannot be forked. Without CUDA a fork is faster: torch is imported already.
    forks = device == "cpu" and "fork" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(section, device, tiny, deadline, theirs))
    process.start()
    theirs.close()
    begun, failures, end = "its start", 0, ""
    try:
        while not end:
            if not ours.poll(max(0.0, kill_at - time.time())):
                end = f"failed: killed in {begun}, {kill_at - deadline:.0f} s after the section's time was over"
                break
            try:
                kind, content = ours.recv()
            except EOFError:
                process.join(GRACE)
                end = f"failed: the process ended in {begun}, with exit code {process.exitcode}"
                break
            if kind == "begin":
                begun = content["what"]
                continue
            if kind == "end":
                end = content["status"]
                continue
            failures += kind == "failure"
            receive(kind, content)
    finally:
        _kill(process)
    return f"failed: {failures} of its measurements" if failures and end == "ok" else end


def _kill(process: Any) -> None:
    """Kill a process and the processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its group has its number, see _main
    process.kill()  # if it did not get so far
    process.join()
    process.close()


def _main(section: Section, device: str, tiny: bool, deadline: float, connection: Connection) -> None:
    """In the new process: run the section and send what it reports."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what the imports have made, so that the collections between measurements are fast
    if device == "cpu":
        # The tiny forms need no more, and threads wait for each other where other programs run.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # else Lightning sets the threads again

    def send(kind: str, content: Row) -> None:
        connection.send((kind, content))

    status = "ok"
    try:
        section(Measuring(send, device, tiny, deadline))
    except SkippedError as reason:
        status = f"skipped: {reason}"
    except Exception:  # noqa: BLE001, RUF100 - the record says what it was
        send("failure", {"what": "the section", "traceback": traceback.format_exc()})
        status = "failed: the section"
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    send("end", {"status": status})
    os._exit(0)  # threads of process groups may abort a process whose interpreter ends
