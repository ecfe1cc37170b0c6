"""The time of a function."""

import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], device: str, calls: int = 1) -> float:
    """Return the seconds of a call on a device, including its asynchronous work: the mean of ``calls`` in a row.

    A GPU is timed by CUDA events. The first is recorded when the GPU is idle, so the time includes waiting for the
    host that launches the work.
    """
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        function()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000 / calls  # from milliseconds
