"""Schedules of the learning rate that torch has only in parts: warm-up with a cosine or a plateau, and one cycle.

On the command line of ``lightning_muon.cli`` their ``total_steps`` is the length of the run unless it is given.
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR


class WarmupCosine(LambdaLR):
    r"""Raise the learning rate linearly, then lower it by half a cosine.

    In step t, counted from 0, of N with w = ``warmup`` · N steps of warm-up, each group's rate is multiplied by

    .. math::
        (t + 1) / w \text{ for } t < w, \qquad
        f + (1 - f)\,\tfrac12\bigl(1 + \cos(\pi (t - w) / (N - w))\bigr) \text{ after it.}

    After N steps it stays at ``floor``. Source of the cosine: Loshchilov and Hutter (2017), arXiv:1608.03983.

    Args:
        optimizer: The optimizer.
        total_steps: N, in optimizer steps; by default that of the run, on the command line only.
        warmup: The share of the steps in which the rate rises.
        floor: f, the last rate, relative to the highest.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int | None = None, warmup: float = 0.05, floor: float = 0.0
    ) -> None:
        self.total_steps = steps = _checked(total_steps, floor, warmup=warmup)
        rise = warmup * steps

        def factor(step: int) -> float:
            done = min(1.0, max(0.0, step - rise) / max(1.0, steps - rise))
            return _rising(step, rise) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

        super().__init__(optimizer, factor)


class WarmupStableDecay(LambdaLR):
    r"""Raise the learning rate linearly, keep it, and lower it linearly at the end.

    A run may be prolonged from a checkpoint before the end, since the rate does not depend on the length until then.
    Source: Hu et al. (2024), "MiniCPM", arXiv:2404.06395; the linear end is that of Hägele et al. (2024),
    arXiv:2405.18392.

    Args:
        optimizer: The optimizer.
        total_steps: The length of the schedule, in optimizer steps; by default that of the run, on the command line
            only. After it the rate stays at ``floor``.
        warmup: The share of the steps in which the rate rises.
        decay: The share of the steps in which it falls.
        floor: The last rate, relative to the highest.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: float = 0.05,
        decay: float = 0.2,
        floor: float = 0.0,
    ) -> None:
        self.total_steps = steps = _checked(total_steps, floor, warmup=warmup, decay=decay)
        rise, fall = warmup * steps, decay * steps

        def factor(step: int) -> float:
            left = max(0, steps - step)
            falling = 1.0 if left >= fall else floor + (1 - floor) * left / fall
            return _rising(step, rise) * falling

        super().__init__(optimizer, factor)


class OneCycle(OneCycleLR):
    """``OneCycleLR`` whose highest learning rate is, in each group, the rate that the optimizer gave the group.

    Torch's own takes one rate for all groups, or a list of as many as there are groups. Momentum goes the other way, as
    in torch: ``betas[0]``, and Muon's ``momentum`` with it. Source: Smith and Topin (2017), arXiv:1708.07120.

    Args:
        optimizer: The optimizer.
        total_steps: The length of the cycle, in optimizer steps; by default that of the run, on the command line only.
        pct_start: The share of the steps in which the rate rises.
        cycle_momentum: Lower the momentum from ``max_momentum`` to ``base_momentum`` while the rate rises.
        base_momentum: The lowest momentum.
        max_momentum: The highest momentum.
        div_factor: The highest rate over the first.
        final_div_factor: The first rate over the last.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        pct_start: float = 0.3,
        cycle_momentum: bool = True,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
    ) -> None:
        super().__init__(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            _checked(total_steps, 0.0, pct_start=pct_start),
            pct_start=pct_start,
            cycle_momentum=cycle_momentum,
            base_momentum=base_momentum,
            max_momentum=max_momentum,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
        )


def _rising(step: int, steps: float) -> float:
    """Return the factor of a warm-up of so many steps, 1 after it."""
    return min(1.0, (step + 1) / steps) if step < steps else 1.0


def _checked(total_steps: int | None, floor: float, **shares: float) -> int:
    """Return the number of steps."""
    if total_steps is None:
        raise ValueError("total_steps must be given: only the command line takes it from the length of the run")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    for name, share in {"floor": floor, **shares}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {share}")
    if sum(shares.values()) > 1:
        raise ValueError(f"{' and '.join(shares)} must be at most 1 together, got {sum(shares.values())}")
    return total_steps
