"""How many steps an optimizer needs for the final loss of another, from few paired seeds, with a confidence interval.

The data are final losses of two optimizers, by horizon and seed, each from a full schedule of so many steps. Runs of
the same seed share initial weights and the order of the data, so only differences within a seed count.

A ratio ρ says that the contestant needs ρ·H steps for what the baseline has after H, the longest horizon. For each ρ

- ρ ≤ 1: ``D_s(ρ) = contestant_s(ρ·H) − baseline_s(H)``
- ρ > 1: ``D_s(ρ) = contestant_s(H) − baseline_s(H/ρ)``, because nothing was measured beyond H

is zero on average if ρ is true. Between horizons the loss of a seed is interpolated, linearly in the data, so the
``D_s`` are independent over seeds, and Student's t-test of their mean is exact for normal noise. The interval contains
the ρ that this test does not reject at 5 % (Fieller, "Some problems in interval estimation", 1954). It takes in the
noise at all horizons and of the slope. At ρ = 1 it is the paired t-test of the final losses: the interval of the ratio
contains one if, and only if, that of the difference contains zero. Where a bound would lie beyond the horizons that
were measured it is open; nothing is extrapolated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Losses = Mapping[int, Sequence[float] | Array]  # of each seed, by the horizon in steps

CONFIDENCE = 0.95
_POINTS = 129  # ratios that are tried on either side of one; between them the bounds are interpolated
_NEAREST = 4  # horizons whose losses give the one between them
# The exponents p of curves a + b·h^−p that two horizons cannot tell apart; 0 is a + b·log h. Scaling laws have 0.3 to
# 0.5, the beginning of a training is nearer to the logarithm.
_EXPONENTS = (0.0, 0.25, 0.5)


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        value: The estimate; ``None`` if it lies beyond what was measured.
        low: The lower bound; ``None`` if it is not known.
        high: The upper bound; ``None`` if it is not known.
    """

    value: float | None
    low: float | None
    high: float | None

    def contains(self, number: float) -> bool:
        """Return whether a number is inside; an unknown bound excludes nothing."""
        return (self.low is None or self.low <= number) and (self.high is None or number <= self.high)

    def text(self, digits: int = 2, sign: str = "") -> str:
        """Return ``0.70 [0.66, 0.75]``, ``at most 0.53`` or ``at least 1.90``.

        Args:
            digits: After the point.
            sign: ``+`` for a difference, which has a sign in any case.
        """

        def write(number: float) -> str:
            return f"{number:{sign}.{digits}f}".replace("-", "−")

        if self.low is not None and self.high is not None:
            value = "" if self.value is None else f"{write(self.value)} "
            return f"{value}[{write(self.low)}, {write(self.high)}]"
        bound = "no interval"
        if self.high is not None:
            bound = f"at most {write(self.high)}"
        elif self.low is not None:
            bound = f"at least {write(self.low)}"
        return bound if self.value is None else f"{write(self.value)}, {bound}"


def mean_interval(values: Sequence[float] | Array) -> Interval:
    """Return the mean of independent values ± t·s/√n, with Student's t for n − 1 degrees of freedom.

    The mean of one value has no interval.
    """
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, None, None)
    margin = float(quantile(len(values)) * _standard_error(values))
    return Interval(mean, mean - margin, mean + margin)


def steps_ratio(contestant: Losses, baseline: Losses) -> Interval:
    """Return the steps that a contestant needs for the baseline's final loss, over the steps of the baseline.

    It is the ratio of tokens too, if both read as many in a step. Ratios below one are found by the contestant's
    shorter horizons, those above one by the baseline's.

    Between three or more horizons a loss is interpolated by the polynomial in log h through the nearest four (or
    three). Two horizons do not tell how the curve bends between them: the margin then takes in how far curves
    ``a + b·h^−p`` differ there for p from 0 to 0.5.

    Args:
        contestant: Its final losses by horizon in steps, each (seeds,), finite.
        baseline: Those of the baseline, of the same seeds in the same order.

    Returns:
        The ratio. A bound beyond the horizons is ``None``. If all of the interval lies there, the bound on this side
        is the last ratio that was measured, so that it reads "at most 0.50". One seed gives no interval.

    Raises:
        ValueError: If the longest horizons differ, if neither has a shorter one, for numbers of seeds that differ, or
            losses that are not finite.
    """
    longest = max(baseline)
    if max(contestant) != longest:
        raise ValueError(f"the longest horizons differ: {max(contestant)} and {longest} steps")
    if len(contestant) == len(baseline) == 1:
        raise ValueError(f"a ratio of steps needs runs that are shorter than {longest} steps")
    if len({len(losses) for of in (contestant, baseline) for losses in of.values()}) > 1:
        raise ValueError("a ratio of steps needs a loss for each horizon and seed")
    if not all(np.isfinite(losses).all() for of in (contestant, baseline) for losses in of.values()):
        raise ValueError("a ratio of steps needs finite losses")
    own, other = _curve(contestant), _curve(baseline)
    # One row for each ratio in ascending order; the ratio of one comes once.
    ratios = np.concatenate([own.logs, -other.logs[-2::-1]])
    differences = np.concatenate([own.losses - other.losses[-1], (own.losses[-1] - other.losses)[-2::-1]])
    mean = differences.mean(1)
    first, last = _crossing(ratios, mean), _crossing(ratios[::-1], -mean[::-1])
    value = None if first is None or last is None else math.exp((first + last) / 2)
    seeds = differences.shape[1]
    if seeds < 2:
        return Interval(value, None, None)
    bend = np.concatenate([own.bend, other.bend[-2::-1]])
    # The bend counts as a standard error. Less, such as bend / √3, covers only 92 of 100.
    margin = np.hypot(quantile(seeds) * _standard_error(differences), quantile() * bend)
    lower, upper = mean - margin, mean + margin
    low = ratios[-1] if (lower > 0).all() else _crossing(ratios, lower)
    high = ratios[0] if (upper < 0).all() else _crossing(ratios[::-1], -upper[::-1])
    return Interval(value, None if low is None else math.exp(low), None if high is None else math.exp(high))


def seconds_ratio(steps: Interval, contestant: Sequence[float] | Array, baseline: Sequence[float] | Array) -> Interval:
    """Return the seconds that a contestant needs for the baseline's final loss, over those of the baseline.

    It is the ratio of steps times the ratio of seconds per step. The logarithms of both are added, and so are the
    squares of the margins on either side (MOVER: Zou and Donner, "Construction of confidence limits about effect
    measures", 2008).

    Args:
        steps: The ratio of steps.
        contestant: Its seconds per step, one for each seed.
        baseline: Those of the baseline with the same seeds.
    """
    logs = np.log(np.asarray(contestant, float)) - np.log(np.asarray(baseline, float))
    speed, mean = mean_interval(logs), float(logs.mean())

    def bound(of_steps: float | None, of_speed: float | None) -> float | None:
        if of_steps is None or of_speed is None:
            return None
        if steps.value is None:  # only a bound is known; the bound of both is safe
            return of_steps * math.exp(of_speed)
        margin = math.hypot(math.log(of_steps / steps.value), of_speed - mean)
        return steps.value * math.exp(mean + math.copysign(margin, of_speed - mean))

    value = None if steps.value is None else steps.value * math.exp(mean)
    return Interval(value, bound(steps.low, speed.low), bound(steps.high, speed.high))


def quantile(count: int | None = None) -> float:
    """Return the two-sided 95 % quantile of Student's t for so many values; the normal one for ``None``.

    Raises:
        ModuleNotFoundError: If scipy is not installed; the message says what to do.
    """
    try:
        from scipy.special import ndtri, stdtrit  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise ModuleNotFoundError("intervals need the package scipy: pip install scipy") from None
    level = (1 + CONFIDENCE) / 2
    return float(ndtri(level) if count is None else stdtrit(count - 1, level))


def _standard_error(values: Array) -> Array:
    """Return the standard error of the mean over the last axis."""
    return np.asarray(values.std(-1, ddof=1) / math.sqrt(values.shape[-1]))


@dataclass(frozen=True)
class _Curve:
    """Losses from the shortest horizon to the longest.

    Attributes:
        logs: Logarithms of steps relative to the longest horizon, (m,), ascending to zero.
        losses: Interpolated, (m, seeds).
        bend: How far the mean loss may be off, because two horizons do not show how the curve bends, (m,).
    """

    logs: Array
    losses: Array
    bend: Array


def _curve(losses: Losses) -> _Curve:
    horizons = sorted(losses)
    values = np.array([losses[horizon] for horizon in horizons], float)
    logs, weights, doubt = _interpolation(tuple(horizons))
    return _Curve(logs, weights @ values, abs(doubt * (values[0] - values[-1]).mean()))


@lru_cache(maxsize=16)  # all optimizers of a comparison have the same few horizons
def _interpolation(horizons: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Return the logarithms of steps, the weights of the horizons there, and the doubt about that of the first."""
    nodes = np.log(np.array(horizons, float) / horizons[-1])
    if len(nodes) == 1:
        return nodes, np.ones((1, 1)), np.zeros(1)
    logs = np.linspace(nodes[0], 0, _POINTS)
    if len(nodes) > 2:
        return logs, _polynomials(nodes, logs), np.zeros(_POINTS)
    shares = [_share(nodes, logs, exponent) for exponent in _EXPONENTS]
    return logs, np.stack([shares[1], 1 - shares[1]], axis=1), (shares[0] - shares[2]) / 2


def _polynomials(nodes: Array, at: Array) -> Array:
    """Return the weights of values at nodes, (k,), for the values at places between them, (m,): (m, k).

    They are Lagrange's, for the nearest nodes, as many on either side where there are.
    """
    weights = np.zeros((len(at), len(nodes)))
    nearest = min(_NEAREST, len(nodes))
    left = np.searchsorted(nodes[1:-1], at, side="right")  # a place lies between this node and the next
    start = np.clip(left - (nearest - 2) // 2, 0, len(nodes) - nearest)
    for first in np.unique(start):
        rows = np.flatnonzero(start == first)
        chosen = nodes[first : first + nearest]
        for place in range(nearest):
            others = np.delete(chosen, place)
            weights[rows, first + place] = np.prod((at[rows, None] - others) / (chosen[place] - others), axis=1)
    return weights


def _share(nodes: Array, at: Array, exponent: float) -> Array:
    """Return the weight of the first of two horizons for a curve a + b·h^−exponent."""
    place, ends = (at, nodes) if exponent == 0 else (np.exp(-exponent * at), np.exp(-exponent * nodes))
    return np.asarray((place - ends[1]) / (ends[0] - ends[1]))


def _crossing(places: Array, values: Array) -> float | None:
    """Return the first place at which values that begin above zero are not above it; ``None`` if there is none."""
    below = values <= 0
    if below[0] or not below.any():
        return None
    after = int(np.argmax(below))
    share = values[after - 1] / (values[after - 1] - values[after])
    return float(places[after - 1] + share * (places[after] - places[after - 1]))
