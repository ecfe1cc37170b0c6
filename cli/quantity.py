"""A quantity of a run: how it is measured from what was logged, and how it is judged."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_muon.cli.run_log import RunLog

Verdict = Literal["ok", "watch", "bad"]


@dataclass(frozen=True)
class Figure:
    """One figure of one run.

    Attributes:
        value: As it is shown.
        verdict: ``None`` where no healthy range is known.
    """

    value: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Quantity:
    """One line of the report.

    Args:
        label: What it is.
        healthy: The healthy range in words; empty where none is known.
        measure: Its value in a run, or ``None`` where the run did not log it.
        judge: The verdict on a finite value.
        advice: What to do about a verdict other than ``ok``.
        show: How a value is written.
    """

    label: str
    healthy: str
    measure: Callable[[RunLog], float | None]
    judge: Callable[[float], Verdict] | None = None
    advice: str = ""
    show: Callable[[float], str] = "{:.4g}".format

    def figure(self, run: RunLog) -> Figure | None:
        """Return the value in a run, with its verdict; what is not finite is always bad."""
        value = self.measure(run)
        if value is None:
            return None
        if not math.isfinite(value):
            return Figure(f"{value:g}", "bad")
        return Figure(self.show(value), self.judge(value) if self.judge else None)


def values(run: RunLog, tag: str) -> list[float]:
    """Return what a run logged under a tag, in the order of the steps."""
    return [value for _, value in run.scalars.get(tag, [])]


def measured(tag: str, reduce: Callable[[Sequence[float]], float]) -> Callable[[RunLog], float | None]:
    """Measure by a reduction over what was logged."""

    def measure(run: RunLog) -> float | None:
        logged = values(run, tag)
        return reduce(logged) if logged else None

    return measure


def final(logged: Sequence[float]) -> float:
    """Return the last value."""
    return logged[-1]


def best(logged: Sequence[float]) -> float:
    """Return the least of the finite values; NaN if there is none."""
    return min((value for value in logged if math.isfinite(value)), default=math.nan)


def peak(logged: Sequence[float]) -> float:
    """Return the largest value; NaN if one value is."""
    return math.nan if any(map(math.isnan, logged)) else max(logged)


def lowest(logged: Sequence[float]) -> float:
    """Return the least value; NaN if one value is."""
    return math.nan if any(map(math.isnan, logged)) else min(logged)


def median(logged: Sequence[float]) -> float:
    """Return the median, in which a few values at the end of a schedule do not count; NaN if one value is."""
    return math.nan if any(map(math.isnan, logged)) else statistics.median(logged)


def growth(logged: Sequence[float]) -> float:
    """Return the ratio of the last value to the first."""
    return logged[-1] / logged[0] if logged[0] else math.nan


def late_growth(logged: Sequence[float]) -> float:
    """Return the relative change over the last quarter of a run, in which a healthy RMS has levelled off."""
    earlier = logged[(len(logged) - 1) * 3 // 4]
    return logged[-1] / earlier - 1 if earlier else math.nan


def risen(logged: Sequence[float]) -> float:
    """Return how far the last value is above the best, relative to that."""
    least = best(logged)
    return (logged[-1] - least) / abs(least) if least else math.nan


def above(watch: float, bad: float) -> Callable[[float], Verdict]:
    """Judge a value whose healthy range ends above."""
    return lambda value: "bad" if value > bad else "watch" if value > watch else "ok"


def below(watch: float, bad: float) -> Callable[[float], Verdict]:
    """Judge a value whose healthy range ends below."""
    return lambda value: "bad" if value < bad else "watch" if value < watch else "ok"


def percent(value: float) -> str:
    """Write a fraction as a percentage."""
    return f"{100 * value:.1f} %"


def signed_percent(value: float) -> str:
    """Write a relative change as a percentage, with its sign."""
    return f"{100 * value:+.1f} %"
