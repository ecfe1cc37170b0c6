"""The floor of a step's time: its FLOPs and bytes, divided by the rates of the machine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stopwatch import seconds

SIDE = 2048  # of the matrices whose product measures the FLOP rate of a CPU
CUDA_SIDE = 8192  # the same for a GPU, which a smaller product does not fill
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
        return count_flops(step) / self.flops + least_bytes / self.bytes


def machine_rates(device: str, side: int | None = None) -> Rates:
    """Measure the rates of this machine: the best of several repetitions, because it may be busy.

    Args:
        device: The device.
        side: Side of the matrices, see :func:`product_rate`.
    """
    source = torch.randn(ELEMENTS, device=device)
    copy = torch.zeros_like(source)  # zeros, so that its pages are allocated before the measurement
    return Rates(
        flops=product_rate(torch.bfloat16, device, side),
        bytes=2 * source.numel() * source.element_size() / _seconds(lambda: copy.copy_(source), device),
    )


def product_rate(dtype: torch.dtype, device: str, side: int | None = None) -> float:
    """Measure the FLOPs per second in products of square matrices, by default large ones."""
    side = side or (CUDA_SIDE if device == "cuda" else SIDE)
    factor = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(factor)
    return 2 * side**3 / _seconds(lambda: torch.mm(factor, factor, out=product), device)


def count_flops(step: Callable[[], object], formulas: dict[Any, Any] | None = None) -> float:
    """Run ``step`` once and return the FLOPs of its matrix products.

    Args:
        step: The function.
        formulas: Further operators to count, see ``torch.utils.flop_counter.FlopCounterMode``.
    """
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return float(counter.get_total_flops())


def _seconds(function: Callable[[], object], device: str) -> float:
    return min(seconds(function, device) for _ in range(REPETITIONS))
