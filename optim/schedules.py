"""Schedules of the learning rate that torch has only in parts: warm-up with a cosine, and with a plateau."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    r"""Raise the learning rate linearly, then lower it by half a cosine.

    In step t, counted from 0, of N with w = ``warmup`` · N steps of warm-up, each group's rate is multiplied by

    .. math::
        (t + 1) / w \text{ for } t < w, \qquad
        f + (1 - f)\,\tfrac12\bigl(1 + \cos(\pi (t - w) / (N - w))\bigr) \text{ after it.}

    After N steps it stays at ``floor``. Source of the cosine: Loshchilov and Hutter (2017), arXiv:1608.03983.

    Args:
        optimizer: The optimizer.
        total_steps: N, in optimizer steps.
        warmup: The share of the steps in which the rate rises.
        floor: f, the last rate, relative to the highest.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, floor: float = 0.0) -> None:
        _check(total_steps, floor, warmup=warmup)
        rise = warmup * total_steps

        def factor(step: int) -> float:
            done = min(1.0, max(0.0, step - rise) / max(1.0, total_steps - rise))
            return _rising(step, rise) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

        super().__init__(optimizer, factor)


class WarmupStableDecay(LambdaLR):
    r"""Raise the learning rate linearly, keep it, and lower it linearly at the end.

    A run may be prolonged from a checkpoint before the end, since the rate does not depend on the length until then.
    Source: Hu et al. (2024), "MiniCPM", arXiv:2404.06395; the linear end is that of Hägele et al. (2024),
    arXiv:2405.18392.

    Args:
        optimizer: The optimizer.
        total_steps: The length of the run, in optimizer steps. After it the rate stays at ``floor``.
        warmup: The share of the steps in which the rate rises.
        decay: The share of the steps in which it falls.
        floor: The last rate, relative to the highest.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.05,
        decay: float = 0.2,
        floor: float = 0.0,
    ) -> None:
        _check(total_steps, floor, warmup=warmup, decay=decay)
        rise, fall = warmup * total_steps, decay * total_steps

        def factor(step: int) -> float:
            left = max(0, total_steps - step)
            falling = 1.0 if left >= fall else floor + (1 - floor) * left / fall
            return _rising(step, rise) * falling

        super().__init__(optimizer, factor)


def _rising(step: int, steps: float) -> float:
    """Return the factor of a warm-up of so many steps, 1 after it."""
    return min(1.0, (step + 1) / steps) if step < steps else 1.0


def _check(total_steps: int, floor: float, **shares: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    for name, share in {"floor": floor, **shares}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {share}")
    if sum(shares.values()) > 1:
        raise ValueError(f"{' and '.join(shares)} must be at most 1 together, got {sum(shares.values())}")
