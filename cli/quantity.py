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

    def __str__(self) -> str:
        return f"{self.value} {self.verdict or ''}".rstrip()


@dataclass(frozen=True)
class Range:
    """A healthy range.

    Args:
        words: What is healthy; empty where nothing is known of it.
        bound: Where it ends.
        judge: The verdict on a finite value.
    """

    words: str = ""
    bound: float | None = None
    judge: Callable[[float], Verdict] | None = None


UNKNOWN = Range()


@dataclass(frozen=True)
class Quantity:
    """One line of the report.

    Args:
        label: What it is.
        healthy: The healthy range.
        measure: Its value in a run, or ``None`` where the run did not log it.
        advice: What to do about a verdict other than ``ok``.
        show: How a value is written.
        concerns: Whether a value is judged in a run; by default in all.
    """

    label: str
    healthy: Range
    measure: Callable[[RunLog], float | None]
    advice: str = ""
    show: Callable[[float], str] = "{:.4g}".format
    concerns: Callable[[RunLog], bool] | None = None

    def figure(self, run: RunLog) -> Figure | None:
        """Return the value in a run, with its verdict; what is not finite is always bad."""
        value = self.measure(run)
        if value is None:
            return None
        if not math.isfinite(value):
            return Figure(f"{value:g}", "bad")
        judge = self.healthy.judge if self.concerns is None or self.concerns(run) else None
        return Figure(self.show(value), judge(value) if judge else None)


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


def up_to(bound: float, bad: float, write: Callable[[float], str] = "up to {:g}".format) -> Range:
    """Return the range up to a bound, and behind ``bad`` what is bad and no longer only to be watched."""
    return Range(write(bound), bound, lambda value: "bad" if value > bad else "watch" if value > bound else "ok")


def under(bound: float, bad: float) -> Range:
    """Return the range under a bound."""
    return up_to(bound, bad, "under {:g}".format)


def under_percent(bound: float, bad: float) -> Range:
    """Return the range under a bound, which is a fraction."""
    return up_to(bound, bad, lambda fraction: f"under {100 * fraction:g} %")


def none(bad: float) -> Range:
    """Return the range of a count that is to be zero."""
    return up_to(0, bad, "{:g}".format)


def above(bound: float, bad: float) -> Range:
    """Return the range above a bound, and under ``bad`` what is bad and no longer only to be watched."""
    return Range(f"above {bound:g}", bound, lambda value: "bad" if value < bad else "watch" if value < bound else "ok")


def percent(value: float) -> str:
    """Write a fraction as a percentage."""
    return f"{100 * value:.1f} %"


def signed_percent(value: float) -> str:
    """Write a relative change as a percentage, with its sign."""
    return f"{100 * value:+.1f} %"
