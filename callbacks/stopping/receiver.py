"""Hear SIGTERM and SIGINT at any moment, and end the process in time."""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any, ClassVar

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Seconds within which a signal counts once. `timeout` and a terminal's Ctrl-C signal a process and its whole group;
# torchrun and srun then pass on to each rank what it has received already.
_SAME_SIGNAL = 0.2
_SAME_SIGNAL_OF_SEVERAL = 1.0
_LAST_WORDS = 1.0  # seconds for what is done before the process ends at once


def exit_code(signum: int) -> int:
    """Return the exit code of a process that a signal ended, as a shell counts: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signum


class StoppedBySignal(SystemExit):
    """Ends the program without a traceback, with the exit code of the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(exit_code(signum))
        self.args = (signum,)  # from which a copy is made: torch.distributed.checkpoint sends errors to all ranks
        self.signum = signum
        SignalReceiver._ending = True


class SignalReceiver:
    """Hears signals in a thread of its own, from :meth:`start` until :meth:`close`.

    Python runs the handler of a signal in the main thread, between two of its instructions. A main thread that waits
    for another rank, or that computes in C++, would not hear of a signal before it is done. But the number of a signal
    is also written to a socket at once (``signal.set_wakeup_fd``), and the thread reads from it.

    After the first signal the process has ``grace`` seconds. Then, or with the second signal, the thread ends it,
    whatever the main thread is doing: with the exit code of the first signal, one line, and no traceback. A process
    that forks, as a DataLoader does, is on its own: a child dies of SIGTERM, and leaves SIGINT, which a terminal sends
    to all processes, to its parent.

    Args:
        grace: Seconds from the first signal to the end of the process.
        heard: Called with the first signal, in the main thread or in the other, whichever is first.
        late: What to say if the grace is over before the process has ended by itself; not said if empty.
        poll: Called in the thread again and again; returns the seconds until the next call.
        before_exit: Called in the thread before it ends the process.
        raises: Whether the first signal raises :class:`StoppedBySignal` in the main thread, wherever it is.
        others: Further signals, with what to call in the thread when one arrives; these end nothing.
        previous: Handlers that the user had installed; called in the main thread with each signal.
    """

    _active: ClassVar[list["SignalReceiver"]] = []
    _ending: ClassVar[bool] = False  # a StoppedBySignal is on its way

    def __init__(
        self,
        grace: float,
        *,
        heard: Callable[[int], None] | None = None,
        late: str = "",
        poll: Callable[[], float] | None = None,
        before_exit: Callable[[], None] | None = None,
        raises: bool = False,
        others: dict[int, Callable[[int], None]] | None = None,
        previous: dict[int, Callable[[int, FrameType | None], Any]] | None = None,
    ) -> None:
        self.grace = grace
        self.signum: int | None = None  # the first signal
        self.received: int | None = None  # likewise, if this process itself has received it
        self._heard, self._poll, self._late = heard, poll, late
        self._before_exit, self._raises = before_exit, raises
        self._others, self._previous = others or {}, previous or {}
        self._heard_at = 0.0
        self._first_read: float | None = None  # when the thread read the first of the signals to this process
        self._closed = False
        self._handlers: dict[int, Any] = {}  # those that were there before
        self._wakeup_fd = -1  # likewise
        self._lock = threading.RLock()  # the handler may interrupt the main thread while this has it

    def start(self) -> bool:
        """Begin to listen. Returns false, and does nothing, outside the main thread, which alone may install handlers.

        A signal that is ignored, as SIGINT is in a shell's background, stays so.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        self._inbox, self._outbox = socket.socketpair()
        for end in (self._inbox, self._outbox):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._wakeup_fd = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._active.append(self)
        SignalReceiver._ending = False
        watch_forks()
        self.take_over()
        return True

    def take_over(self) -> None:
        """Install the handlers; once more if somebody else has installed theirs meanwhile, which are put off."""
        for signum in (*STOP_SIGNALS, *self._others):
            handler = signal.getsignal(signum)
            if handler != self._handle and handler not in (signal.SIG_IGN, None):
                self._handlers.setdefault(signum, handler)
                signal.signal(signum, self._handle)

    def close(self) -> None:
        """Listen no more, and give the handlers back; the process goes on even if a signal has arrived."""
        if self._closed or self not in self._active:
            return
        self._closed = True
        self._active.remove(self)
        for signum, handler in self._handlers.items():
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)
        own = self._outbox.fileno()
        now = signal.set_wakeup_fd(self._wakeup_fd)
        if now != own:
            signal.set_wakeup_fd(now)
        with suppress(OSError):
            self._outbox.send(b"\0")
        self._thread.join()
        self._inbox.close()
        self._outbox.close()

    def tell(self, signum: int) -> None:
        """Count the grace from now on, because of a signal that another rank has received."""
        with self._lock:
            if self.signum is None:
                self.signum, self._heard_at = signum, time.monotonic()

    def stop_polling(self) -> None:
        """Call ``poll`` no more: the process is ending, and what it asks may be gone."""
        self._poll = None

    def end_now(self) -> None:
        """End the process with the exit code of the first signal."""
        if self._before_exit:
            last_words = threading.Thread(target=self._before_exit, daemon=True)
            last_words.start()
            last_words.join(_LAST_WORDS)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(exit_code(self.signum or signal.SIGTERM))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum in self._previous:
            self._previous[signum](signum, frame)
        if signum in STOP_SIGNALS:
            self._hear(signum)
            # Once: the next one may arrive where nobody expects an exception any more.
            if self._raises and not self._ending:
                raise StoppedBySignal(signum)

    def _hear(self, signum: int) -> None:
        """Act on a signal if it is the first."""
        with self._lock:
            self.received = self.received or signum
            if self.signum is not None:
                return
            self.signum, self._heard_at = signum, time.monotonic()
        if self._heard:
            self._heard(signum)

    def _listen(self) -> None:
        next_poll = time.monotonic()
        while not self._closed:
            if self._poll and time.monotonic() >= next_poll:
                next_poll = time.monotonic() + self._poll()
            deadline = self._heard_at + self.grace if self.signum is not None else float("inf")
            if time.monotonic() >= deadline:
                if self._late:
                    sys.stderr.write(f"\n{self._late}\n")
                self.end_now()
            wake_at = min(next_poll if self._poll else float("inf"), deadline)
            timeout = None if wake_at == float("inf") else max(0.0, wake_at - time.monotonic())
            readable, _, _ = select.select([self._inbox], [], [], timeout)
            if readable and not self._closed:
                self._received(self._inbox.recv(64))
                next_poll = time.monotonic()

    def _received(self, numbers: Iterable[int]) -> None:
        for signum in numbers:
            if signum in self._others:
                self._others[signum](signum)
            elif signum in STOP_SIGNALS:
                several = int(os.environ.get("WORLD_SIZE", "1")) > 1
                now = time.monotonic()
                if self._first_read is None:
                    self._first_read = now
                    self._hear(signum)
                elif now - self._first_read > (_SAME_SIGNAL_OF_SEVERAL if several else _SAME_SIGNAL):
                    self.end_now()


_forks_are_watched = False
_forks_belong_to_a_run = False


def watch_forks(*, of_a_run: bool | None = None) -> None:
    """Keep signals of forked processes apart from those of this one, from now on.

    Args:
        of_a_run: Whether to do so even while no receiver listens, since a DataLoader forks before the training starts.
    """
    global _forks_are_watched, _forks_belong_to_a_run  # noqa: PLW0603 - there is one process
    if of_a_run is not None:
        _forks_belong_to_a_run = of_a_run
    if not _forks_are_watched and hasattr(os, "register_at_fork"):
        _forks_are_watched = True
        os.register_at_fork(after_in_child=_in_a_child)


def _in_a_child() -> None:
    """Let a forked process die of SIGTERM, and tell nobody: it has the socket of its parent."""
    if SignalReceiver._active or _forks_belong_to_a_run:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        SignalReceiver._active.clear()
