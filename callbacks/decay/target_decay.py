r"""The weight decay that brings weights to a target RMS and holds them there, computed from their norms alone.

A step with learning rate η and decoupled decay λ takes weights :math:`W` to :math:`W' = (1 - ηλ) W - ηU`. Therefore

.. math:: \ln\|W'\| = \ln(1 - ηλ) + \ln\|W - ηU / (1 - ηλ)\|

and the growth of :math:`\ln\|W\|` over any number of steps, minus :math:`\sum \ln(1 - ηλ)`, is the growth by the
updates alone, :math:`G`. The decay that holds the norm is :math:`G / \sum η`: the average over all these steps of
:math:`(η\|U\|^2/2 - \langle W, U\rangle) / \|W\|^2`, up to the next order in η.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The largest fraction of the weights that a step may remove.
LARGEST_STEP = 0.5

# Smaller changes of the decay, as a fraction of the range between its bounds, are not reported.
REPORTED_CHANGE = 0.01

# Keys of a group that hold other learning rates than the current one: the first is set by every scheduler, the second
# by those that cycle.
PLANNED_LRS = ("initial_lr", "max_lr")

# A schedule that does not rise although it is below this fraction of the planned learning rate has another plan: such
# as LambdaLR over lr=1, whose function returns the learning rate itself.
NEAR_THE_PLAN = 0.5


class Aim(NamedTuple):
    """How to approach a target."""

    horizon: int  # steps in which the distance to it, as a logarithm, falls to 1/e
    smoothing: float  # weight of the past in the moving averages
    bounds: tuple[float, float]  # smallest and largest decay


class Reasoning(NamedTuple):
    """The numbers from which a decay was computed."""

    rms: float  # measured
    target: float
    growth: float  # fraction by which the updates alone let the RMS grow, per step
    holding: float  # the decay that holds the RMS where it is
    at_target: float  # the decay that holds it at the target; below it, the same updates will matter less there
    steering: float  # what is added to approach the target
    bounded: float  # at_target + steering, clamped to the bounds
    decay: float  # that, clamped to steps that remove at most LARGEST_STEP of the weights

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
    """The decay of one set of weights, and the state from which it is computed."""

    decay: float | None = None  # computed last
    rms: float = 0.0  # measured last; 0 if no growth can be computed from it
    left_out: list[str] = field(default_factory=list)  # matrices that were not part of it
    steps: int = 0  # steps since
    lr: float | Tensor = 0.0  # sum of their learning rates
    log_kept: float | Tensor = 0.0  # sum of their ln(1 − lr·decay): what decay alone did to the logarithm of the RMS
    growth: float = 0.0  # moving average of the growth by updates alone between two measurements, as a logarithm
    growth_lr: float = 0.0  # the same average of the sums of learning rates
    told: float | None = None  # reported last

    def took(self, lr: float | Tensor, decay: float) -> None:
        """Record a step. There is no synchronization for a learning rate on a device."""
        self.steps += 1
        self.lr = self.lr + lr
        self.log_kept = self.log_kept + _log_kept(lr, decay)

    def measure(self, rms: float, left_out: list[str], target: float | None, aim: Aim) -> Reasoning | None:
        """Compute the decay of the next steps; return None if the measurements do not determine it.

        Args:
            rms: RMS of the weights; 0 or not finite if it could not be measured.
            left_out: Matrices that are not part of it. Two measurements of different matrices are not compared.
            target: The target RMS; None if it is not known yet.
            aim: How to approach it.
        """
        steps, lr, log_kept = self.steps, float(self.lr), float(self.log_kept)
        comparable = self.rms > 0 and rms > 0 and math.isfinite(rms) and left_out == self.left_out
        growth = math.log(rms / self.rms) - log_kept if comparable else math.nan
        self.rms, self.left_out = rms if math.isfinite(rms) else 0.0, left_out
        self.steps, self.lr, self.log_kept = 0, 0.0, 0.0
        if log_kept == -math.inf:  # the learning rate has risen many times since the decay was computed
            self.decay = None
        # With a learning rate of 0 the weights do not change, whatever the decay is.
        if not math.isfinite(growth) or not lr > 0:
            return None
        # Two averages: where the learning rate falls, the ratio is still that of many steps, the larger ones first.
        self.growth = aim.smoothing * self.growth + (1 - aim.smoothing) * growth
        self.growth_lr = aim.smoothing * self.growth_lr + (1 - aim.smoothing) * lr
        return None if target is None else self._steer(target, lr / steps, max(aim.horizon, steps), aim.bounds)

    def is_news(self, bounds: tuple[float, float]) -> bool:
        """Return whether the decay has changed by half since the last report, or to or from a bound."""
        if self.decay is None or self.told is None:
            return self.decay is not None
        change = abs(self.decay - self.told)
        if change <= REPORTED_CHANGE * (bounds[1] - bounds[0]):
            return False
        return change > abs(self.told) / 2 or any((self.decay == bound) != (self.told == bound) for bound in bounds)

    def state(self) -> dict[str, Any]:
        """Return all fields in plain numbers."""
        return {**vars(self), "lr": float(self.lr), "log_kept": float(self.log_kept), "left_out": list(self.left_out)}

    def _steer(self, target: float, lr: float, horizon: int, bounds: tuple[float, float]) -> Reasoning:
        per_lr = self.growth / self.growth_lr
        # Below the target, what matters is the growth there. Relative to the weights an update shrinks at least as
        # 1/RMS. Without this, young weights, which double in a few steps, would be held before they are grown.
        at_target = per_lr * min(1.0, self.rms / target)
        # The logarithm of the distance falls by 1/horizon a step; the horizon is at least the interval of measurements,
        # so that the target is not overshot.
        steering = math.log(self.rms / target) / (horizon * lr)
        bounded = min(max(at_target + steering, bounds[0]), bounds[1])
        self.decay = min(bounded, LARGEST_STEP / lr)
        return Reasoning(self.rms, target, per_lr * lr, per_lr, at_target, steering, bounded, self.decay)


def _log_kept(lr: float | Tensor, decay: float) -> float | Tensor:
    """Return ln(1 − lr·decay); -inf if the step removes all of the weights."""
    if isinstance(lr, Tensor):
        return torch.log1p((-lr * decay).clamp(min=-1.0))
    return math.log1p(-lr * decay) if lr * decay < 1 else -math.inf


def planned_lr(group: Mapping[str, Any]) -> float:
    """Return the learning rate that a group's schedule starts from, or rises to; 0 without a schedule."""
    return max(float(group.get(key) or 0.0) for key in PLANNED_LRS)


@dataclass
class Bf16Target:
    r"""The RMS of a group's weights above which bfloat16 begins to lose their updates.

    Between 2^e and 2^(e+1) bfloat16 numbers are 2^(e-7) apart, so at an RMS of :math:`R` their spacing is at most
    :math:`2^{-7} R`. The typical update is as large as the spacing while :math:`R \le 2^7 \operatorname{rms}(ηU)`.
    """

    update_rms: float = 0.0  # moving average of rms(U); 0 before the first update
    lr: float = 0.0  # the full learning rate: at the end of a schedule updates vanish, whatever the weights are
    largest_lr: float = 0.0
    last_lr: float = 0.0

    def saw_lr(self, lr: float, planned: float) -> None:
        """Record the learning rate of a measurement, and the :func:`planned_lr`."""
        rising = lr > self.last_lr
        self.largest_lr, self.last_lr = max(self.largest_lr, lr), lr
        follows_the_plan = rising or self.largest_lr >= NEAR_THE_PLAN * planned
        self.lr = max(self.largest_lr, planned if follows_the_plan else 0.0)

    def saw(self, update_rms: float, smoothing: float) -> None:
        """Add the RMS of an update to the moving average."""
        past = smoothing if self.update_rms else 0.0
        self.update_rms = past * self.update_rms + (1 - past) * update_rms

    @property
    def rms(self) -> float | None:
        """The target; None before the first update."""
        return self.lr * self.update_rms / torch.finfo(torch.bfloat16).eps or None

    def __str__(self) -> str:
        return f"2^7 · lr {self.lr:.3g} · update RMS {self.update_rms:.3g}"
