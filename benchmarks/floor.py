"""The least time that a step could take: its FLOPs and bytes over what the machine does a second."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stopwatch import seconds

SIDE = 2048  # of the products that show how fast the machine multiplies
ELEMENTS = 1 << 26  # of the copies that show how fast it reads and writes: far more than a cache holds
REPETITIONS = 5


@dataclass(frozen=True)
class Rates:
    """What a machine does a second.

    Args:
        flops: Of products of bfloat16 matrices.
        bytes: Read and written, in copies of float32.
    """

    flops: float
    bytes: float

    def floor(self, step: Callable[[], object], least_bytes: int) -> float:
        """Return the seconds that ``step`` would take at these rates, if it touched ``least_bytes`` of memory.

        Only matrix products count as FLOPs; ``step`` is run once, to count them.
        """
        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops()) / self.flops + least_bytes / self.bytes


def machine_rates(device: str) -> Rates:
    """Measure a machine: the best of several repetitions, since others may be at work on it."""
    factor = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(factor)
    source = torch.randn(ELEMENTS, device=device)
    copy = torch.zeros_like(source)  # zeros, so that its pages are there
    return Rates(
        flops=2 * SIDE**3 / _seconds(lambda: torch.mm(factor, factor, out=product), device),
        bytes=2 * source.numel() * source.element_size() / _seconds(lambda: copy.copy_(source), device),
    )


def _seconds(function: Callable[[], object], device: str) -> float:
    return min(seconds(function, device) for _ in range(REPETITIONS))
