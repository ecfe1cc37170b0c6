"""Cautious weight decay: only weights that the step does not push outwards decay."""

import torch
from torch import Tensor


def decaying(weights: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
    """Return each weight where the step that is subtracted from it does not push it outwards, and zero elsewhere.

    Source: Chen et al., "Cautious Weight Decay" (2025), arXiv:2510.12402.
    """
    if all(weight.is_cpu for weight in weights):
        return [weight * (step * weight >= 0) for weight, step in zip(weights, steps, strict=True)]
    # Elsewhere few launches matter more than few passes: −1 where the step pushes outwards, 0 elsewhere.
    outwards = torch._foreach_mul(steps, weights)
    torch._foreach_sign_(outwards)
    torch._foreach_clamp_max_(outwards, 0.0)
    return list(torch._foreach_addcmul(weights, weights, outwards))
