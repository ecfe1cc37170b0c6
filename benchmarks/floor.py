"""The floor of a step's time: its FLOPs and bytes, divided by the rates of the machine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stopwatch import seconds

SIDE = 2048  # of the matrices whose product measures the FLOP rate
ELEMENTS = 1 << 26  # of the tensor whose copy measures the memory rate; much larger than a cache
REPETITIONS = 5


@dataclass(frozen=True)
class Rates:
    """The rates of a machine.

    Args:
        flops: FLOPs per second in products of bfloat16 matrices.
        bytes: Bytes read and written per second in copies of float32 tensors.
    """

    flops: float
    bytes: float

    def floor(self, step: Callable[[], object], least_bytes: int) -> float:
        """Return the seconds of ``step`` at these rates, with ``least_bytes`` of memory traffic.

        Run ``step`` once to count its FLOPs. Only matrix products are counted.
        """
        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops()) / self.flops + least_bytes / self.bytes


def machine_rates(device: str) -> Rates:
    """Measure the rates of this machine: the best of several repetitions, because it may be busy."""
    factor = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(factor)
    source = torch.randn(ELEMENTS, device=device)
    copy = torch.zeros_like(source)  # zeros, so that its pages are allocated before the measurement
    return Rates(
        flops=2 * SIDE**3 / _seconds(lambda: torch.mm(factor, factor, out=product), device),
        bytes=2 * source.numel() * source.element_size() / _seconds(lambda: copy.copy_(source), device),
    )


def _seconds(function: Callable[[], object], device: str) -> float:
    return min(seconds(function, device) for _ in range(REPETITIONS))
