"""Signals outside of training, and the command that resumes. In training, ``StopOnSignal`` acts on signals.

torch and Lightning are not imported: this serves light commands, and the seconds in which they are imported.
"""

import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lightning_muon.cli.output import program_name


@contextmanager
def ending_quietly() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the program at once, with exit code 143 and 130, and without a traceback.

    It does nothing outside the main thread, and leaves handlers that are not Python's own.
    """
    found = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    own = [signum for signum, handler in found.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        own = []
    for signum in own:
        signal.signal(signum, _end)
    try:
        yield
    finally:
        for signum in own:
            if signal.getsignal(signum) == _end:
                signal.signal(signum, found[signum])


def _end(signum: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def resume_command(args: Sequence[str], checkpoint: str) -> str:
    """Return the command that goes on from a checkpoint, with everything else as it was.

    Args:
        args: The command line that started the run.
        checkpoint: The path of the checkpoint.
    """
    if {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys():
        # What was before the program's name is not known here.
        return f"the same command, with --ckpt_path {shlex.quote(checkpoint)}"
    rest = []
    skip = False
    for arg in args:
        if not skip and arg != "--ckpt_path" and not arg.startswith("--ckpt_path="):
            rest.append(arg)
        skip = arg == "--ckpt_path"
    return f"{program_name()} {shlex.join([*rest, '--ckpt_path', checkpoint])}"
