"""How much memory a function takes beyond what is there before."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Return the largest number of bytes that ``function`` holds at a time; None where nobody counts them.

    On CUDA torch counts; on Linux the kernel does, in pages that are in memory.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and not be counted
    CLEAR.write_text("5")  # sets VmHWM to VmRSS; see proc_pid_clear_refs(5)
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
