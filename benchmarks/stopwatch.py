"""The time of a function."""

import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], device: str) -> float:
    """Return the seconds of a function on a device, including its asynchronous work."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
