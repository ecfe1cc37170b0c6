"""Signals outside of training. In training, ``StopOnSignal`` acts on signals.

torch and Lightning are not imported: this serves light commands, and the seconds in which they are imported.
"""

import atexit
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def ending_quietly() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the program at once, with exit code 143 and 130, and without a traceback.

    After a signal, further ones are ignored once the interpreter exits: torchrun signals all ranks when one has ended.
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
    except SystemExit as ending:
        if ending.code in {128 + signum for signum in own}:
            atexit.register(_ignore, own)
        raise
    finally:
        for signum in own:
            if signal.getsignal(signum) == _end:
                signal.signal(signum, found[signum])


def _ignore(signums: Sequence[int]) -> None:
    """Ignore signals, whose default action an exiting interpreter restores: it would change the exit code."""
    for signum in signums:
        signal.signal(signum, signal.SIG_IGN)


def _end(signum: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
