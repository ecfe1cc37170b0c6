"""The peak memory of a function."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Return the peak memory of ``function`` in bytes, beyond the memory before the call.

    On CUDA torch counts the allocations. On Linux the kernel counts resident pages. Elsewhere return None.
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
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory is used again and not counted
    CLEAR.write_text("5")  # sets VmHWM to VmRSS; see proc_pid_clear_refs(5)
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
