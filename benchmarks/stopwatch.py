"""How long a function takes."""

import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], device: str) -> float:
    """Return the seconds that a function takes on a device, with what it has left to the device to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
