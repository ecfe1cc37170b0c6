"""Spikes of a series, such as the loss or the norm of the gradient, beside what it was shortly before."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# How many values are judged at a time by those before them.
PIECE = 25
# The standard deviation of a normal distribution is so many times its median absolute deviation.
SIGMAS_PER_MAD = 1.4826
# The smallest spread that a series is taken to have, relative to its median: a smooth loss has hardly any of its own,
# while the norm of a gradient doubles now and then in a healthy run.
LEAST_SPREAD_OF_LOSS = 0.1
LEAST_SPREAD_OF_NORM = 0.3
# Over how many values spikes are counted, as in the spike score of OLMo 2 (arXiv 2501.00656).
COUNTED = 1000


class Spike(NamedTuple):
    """The highest value of a spike so far, and the median of the values before."""

    step: int
    value: float
    usual: float


class SpikeFinder:
    """Find the values of a series that are far above the median of those before them; each spike once.

    A value is in a spike if it is above the median by more than ``factor`` spreads. The spread is that of a normal
    distribution with the same median absolute deviation, and at least ``least_spread`` of the median. The spike is over
    after a piece of the series without such values.

    Args:
        factor: How many spreads a spike is high.
        least_spread: The smallest spread, relative to the median: with 0.1 and a factor of 10 a spike is at least twice
            as high as usual.
        window: How many values are compared with; at least a quarter of them must be there.
    """

    def __init__(self, factor: float, least_spread: float = LEAST_SPREAD_OF_LOSS, window: int = 100) -> None:
        self.factor = factor
        self.least_spread = least_spread
        self._least = window // 4
        self._values: deque[float] = deque(maxlen=window)
        self._is_high: deque[bool] = deque(maxlen=COUNTED)
        self._in_a_spike = False

    @property
    def often(self) -> int:
        """How many of the last 1000 values are in a spike."""
        return sum(self._is_high)

    def find(self, series: Iterable[tuple[int, float]]) -> Iterator[Spike]:
        """Add steps and values to the series, and yield the spikes that begin there; what is not finite is left out."""
        finite = [(step, value) for step, value in series if math.isfinite(value)]
        for start in range(0, len(finite), PIECE):
            piece = finite[start : start + PIECE]
            usual, bound = self._bound()
            was_in_a_spike = self._in_a_spike
            step, value = max(piece, key=lambda entry: entry[1])
            self._in_a_spike = value > bound
            self._is_high.extend(value > bound for _, value in piece)
            self._values.extend(value for _, value in piece)
            if self._in_a_spike and not was_in_a_spike:
                yield Spike(step, value, usual)

    def _bound(self) -> tuple[float, float]:
        """Return the median of the values, and the largest value that is not in a spike."""
        if len(self._values) < self._least:
            return math.nan, math.inf
        usual = _median(self._values)
        spread = SIGMAS_PER_MAD * _median(abs(value - usual) for value in self._values)
        return usual, usual + self.factor * max(spread, self.least_spread * abs(usual))


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
