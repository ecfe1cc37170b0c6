"""What bfloat16 would do to weights and to their updates."""

import math

import torch
from torch import Tensor

# bfloat16 has 8 bits of precision: between 2^e and 2^(e+1) its numbers are 2^(e-7) apart.
BF16_FRACTION_BITS = 7

BF16_LARGEST = torch.finfo(torch.bfloat16).max


def bf16_spacing(value: float) -> float:
    """Return the distance between neighbouring bfloat16 numbers (ulp) at the size of a value; tiny for zero."""
    # frexp: value = fraction · 2^exponent with ½ ≤ fraction < 1
    _, exponent = math.frexp(max(abs(value), torch.finfo(torch.float32).tiny))
    return math.ldexp(1.0, exponent - 1 - BF16_FRACTION_BITS)


def doublings_to_overflow(largest: float) -> float:
    """Return how often the largest entry may double before bfloat16 overflows, log₂(3.39e38 / largest)."""
    if math.isfinite(largest) and largest > 0:
        return math.log2(BF16_LARGEST) - math.log2(largest)
    return math.inf if largest == 0 else math.nan if math.isnan(largest) else -math.inf


def count_lost(weight: Tensor, update: Tensor) -> Tensor:
    """Return how many entries keep their value in bfloat16 when an update is rounded to nearest: a float32 scalar.

    Args:
        weight: Before the update. If it is bfloat16 itself, the update has been rounded already.
        update: What was added to it, of the same shape.
    """
    if weight.dtype == torch.bfloat16:
        moves = update
    else:
        rounded = weight.bfloat16()
        moves = (rounded + update).bfloat16() != rounded  # the sum is in the precision of the update
    return (weight.numel() - moves.count_nonzero()).float()
