"""What a section reports while it measures: rows, what it skipped, and what failed."""

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Row = dict[str, Any]
# A message to the process that writes the record: its kind ("begin", "row" or "failure"), and its content.
Send = Callable[[str, Row], object]


class SkippedError(Exception):
    """Raised by a section, or inside :meth:`Measuring.row`, with the reason why there is nothing to measure."""


class Measuring:
    """Report each measurement as soon as it is made.

    Args:
        send: Called with each message.
        device: ``"cuda"`` or ``"cpu"``.
        tiny: Whether to measure tiny forms, which only show that everything runs.
        deadline: Value of ``time.time()`` after which no further measurement begins.
    """

    def __init__(self, send: Send, device: str, tiny: bool, deadline: float) -> None:
        self.send = send
        self.device = device
        self.tiny = tiny
        self.deadline = deadline

    @property
    def seconds_left(self) -> float:
        """The seconds before the deadline, at least zero."""
        return max(0.0, self.deadline - time.time())

    def needs_cuda(self) -> None:
        """Raise :class:`SkippedError` without CUDA."""
        if self.device != "cuda":
            raise SkippedError("no CUDA")

    def each(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the names of measurements while there is time, and report the others as skipped."""
        for name in names:
            if self.seconds_left > 0:
                yield name
            else:
                self.skip(name, "the time of the section was over")

    def skip(self, name: str, reason: str) -> None:
        """Report that a measurement was left out."""
        self.send("row", {"what": name, "skipped": reason})

    @contextmanager
    def row(self, name: str) -> Iterator[Row]:
        """Give a dict to fill with results, and report it; an exception is reported, and the section goes on."""
        found: Row = {"what": name}
        self.send("begin", found)
        try:
            yield found
        except SkippedError as reason:
            self.skip(name, str(reason))
        except Exception:  # noqa: BLE001, RUF100 - one failure must not end the other measurements
            self.send("failure", {"what": name, "traceback": traceback.format_exc()})
        else:
            self.send("row", found)
        finally:
            self.free()

    def free(self) -> None:
        """Free the memory of what was measured."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
