r"""The weight decay that brings weights to a given size and holds them there, computed from their norms alone.

A step with learning rate η and decoupled decay λ takes weights :math:`W` to :math:`W' = (1 - ηλ) W - ηU`. Therefore

.. math:: \ln\|W'\| = \ln(1 - ηλ) + \ln\|W - ηU / (1 - ηλ)\|

and what is left of the growth of :math:`\ln\|W\|` over any number of steps, once :math:`\sum \ln(1 - ηλ)` is taken off,
is the growth by the updates alone, :math:`G`. The decay that holds the norm is :math:`G / \sum η`: the average over all
these steps of :math:`(η\|U\|^2/2 - \langle W, U\rangle) / \|W\|^2`, up to the next order in η.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A step that takes more than half of the weights is no decay any more, and one that takes all cannot be reckoned with.
LARGEST_STEP = 0.5

# Smaller changes of the decay, as a fraction of the way between its bounds, are not worth a line.
TELLING_CHANGE = 0.01


class Aim(NamedTuple):
    """How a target is approached.

    Args:
        horizon: Steps in which the distance to the target, as a logarithm, falls to 1/e.
        smoothing: Weight of the past in the averages.
        bounds: The smallest and the largest decay.
    """

    horizon: int
    smoothing: float
    bounds: tuple[float, float]


class Reasoning(NamedTuple):
    """Why the decay is what it is.

    Args:
        rms: What was measured.
        target: What it should be.
        growth: By which fraction the updates alone let the RMS grow, per step.
        holding: The decay that holds the RMS where it is.
        at_target: The one that will hold it at the target; below it, the same updates will count for less there.
        steering: What is added to it to get there.
        bounded: Their sum, kept within the bounds.
        decay: That, kept to steps that leave something of the weights.
    """

    rms: float
    target: float
    growth: float
    holding: float
    at_target: float
    steering: float
    bounded: float
    decay: float

    def __str__(self) -> str:
        wanted = self.at_target + self.steering
        there = f", at the target {self.at_target:.3g}" if self.at_target != self.holding else ""
        bounded = f", which the bounds make {self.bounded:.3g}" if self.bounded != wanted else ""
        kept = f"; as a step takes half of the weights at most, {self.decay:.3g}" if self.decay < self.bounded else ""
        return (
            f"its weight RMS is {self.rms:.3g}, the target {self.target:.3g}; updates alone change it by"
            f" {100 * self.growth:+.2g} % a step, to hold it takes a decay of {self.holding:.3g}{there}, to get to the"
            f" target {self.steering:+.2g}: {wanted:.3g}{bounded}{kept}"
        )


@dataclass
class TargetDecay:
    """The decay of one set of weights, and what is known of its growth.

    Args:
        decay: What was computed last; None before the first time.
        rms: The last measurement; 0 if there was none that a growth can be reckoned from.
        left_out: The matrices that were not part of it.
        steps: How many there were since.
        lr: Sum of their learning rates.
        log_kept: Sum of their ln(1 - lr·decay), what decay alone did to the logarithm of the RMS.
        growth: Moving average of the growth by updates alone from one measurement to the next, as a logarithm.
        growth_lr: The same average of the sums of learning rates.
        told: The decay that was told last.
    """

    decay: float | None = None
    rms: float = 0.0
    left_out: list[str] = field(default_factory=list)
    steps: int = 0
    lr: float | Tensor = 0.0
    log_kept: float | Tensor = 0.0
    growth: float = 0.0
    growth_lr: float = 0.0
    told: float | None = None

    def took(self, lr: float | Tensor, decay: float) -> None:
        """Count a step; a learning rate on a device is not waited for."""
        self.steps += 1
        self.lr = self.lr + lr
        self.log_kept = self.log_kept + _log_kept(lr, decay)

    def measure(self, rms: float, left_out: list[str], target: float | None, aim: Aim) -> Reasoning | None:
        """Compute the decay for the steps to come, and say why; None if there is nothing to compute it from.

        Args:
            rms: Of the weights; 0 or not finite where nothing can be said.
            left_out: Matrices that are not in it: nothing follows from a comparison with others.
            target: What it should be; None if that is not known yet.
            aim: How to get there.
        """
        steps, lr, log_kept = self.steps, float(self.lr), float(self.log_kept)
        alike = self.rms > 0 and rms > 0 and math.isfinite(rms) and left_out == self.left_out
        growth = math.log(rms / self.rms) - log_kept if alike else math.nan
        self.rms, self.left_out = rms if math.isfinite(rms) else 0.0, left_out
        self.steps, self.lr, self.log_kept = 0, 0.0, 0.0
        if log_kept == -math.inf:  # the learning rate has risen many times since the decay was computed
            self.decay = None
        # At a learning rate of 0 the weights rest, whatever their decay is.
        if not math.isfinite(growth) or not lr > 0:
            return None
        # Averaged apart: where the learning rate falls, the ratio is still one of many steps, the larger ones ahead.
        self.growth = aim.smoothing * self.growth + (1 - aim.smoothing) * growth
        self.growth_lr = aim.smoothing * self.growth_lr + (1 - aim.smoothing) * lr
        return None if target is None else self._steer(target, lr / steps, max(aim.horizon, steps), aim.bounds)

    def is_news(self, bounds: tuple[float, float]) -> bool:
        """Tell whether the decay has changed enough since it was told: by half of it, or to or from a bound."""
        if self.decay is None or self.told is None:
            return self.decay is not None
        change = abs(self.decay - self.told)
        if change <= TELLING_CHANGE * (bounds[1] - bounds[0]):
            return False
        return change > abs(self.told) / 2 or any((self.decay == bound) != (self.told == bound) for bound in bounds)

    def state(self) -> dict[str, Any]:
        """Return all of it in plain numbers."""
        return {**vars(self), "lr": float(self.lr), "log_kept": float(self.log_kept), "left_out": list(self.left_out)}

    def _steer(self, target: float, lr: float, horizon: int, bounds: tuple[float, float]) -> Reasoning:
        per_lr = self.growth / self.growth_lr
        # Below the target, what counts is how the weights will grow there. Relative to the weights an update shrinks at
        # least as 1/RMS: otherwise young weights, which double in a few steps, would be held before they are grown.
        at_target = per_lr * min(1.0, self.rms / target)
        # The logarithm of the distance is to fall by 1/horizon a step, and not by more than is there until the next
        # measurement.
        steering = math.log(self.rms / target) / (horizon * lr)
        bounded = min(max(at_target + steering, bounds[0]), bounds[1])
        self.decay = min(bounded, LARGEST_STEP / lr)
        return Reasoning(self.rms, target, per_lr * lr, per_lr, at_target, steering, bounded, self.decay)


def _log_kept(lr: float | Tensor, decay: float) -> float | Tensor:
    """Return ln(1 - lr·decay); -inf where a step leaves nothing of the weights."""
    if isinstance(lr, Tensor):
        return torch.log1p((-lr * decay).clamp(min=-1.0))
    return math.log1p(-lr * decay) if lr * decay < 1 else -math.inf
