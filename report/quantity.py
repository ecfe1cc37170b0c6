"""What an entry of the table of quantities is made of: healthy range, lines of the report, chart, panel of curves."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

WORST = 10.0  # the end of the scale of severities

# ``costly`` tells where the time goes; the run is as healthy as its other verdicts say.
Verdict = Literal["ok", "costly", "watch", "bad"]


@dataclass(frozen=True)
class Range:
    """A healthy range.

    Args:
        words: The range in words; empty where none is known.
        bound: The last healthy value.
        bad: Beyond this value the verdict is ``bad``. If it is less than ``bound``, healthy values are above.
        beyond: The verdict on values between the two.
        origin: The best value, from which the way to the bound is measured.
    """

    words: str = ""
    bound: float | None = None
    bad: float = math.inf
    beyond: Verdict = "watch"
    origin: float = 0.0

    def judge(self, value: float) -> Verdict | None:
        """Return the verdict on a finite value; ``None`` where no range is known."""
        if self.bound is None:
            return None
        sign = -1 if self.bad < self.bound else 1
        return "bad" if sign * value > sign * self.bad else self.beyond if sign * value > sign * self.bound else "ok"

    def severity(self, value: float) -> float | None:
        """Return a value on the scale of all verdicts, on which quantities of any unit are one chart.

        Up to 1 it is healthy: the part of the limit that it has reached. Up to 2 is ``watch``, above is ``bad``; there
        the scale is logarithmic. ``None`` where no range is known.
        """
        verdict = self.judge(value) if math.isfinite(value) else "bad" if self.bound is not None else None
        if verdict is None or self.bound is None:
            return None
        if not math.isfinite(value):
            return WORST
        is_least = self.bad < self.bound
        if verdict == "ok":
            if self.bound <= 0:
                return 0.0
            part = self.bound / value if is_least else (value - self.origin) / (self.bound - self.origin)
            return min(max(part, 0.0), 1.0)
        if self.bad == self.bound or (is_least and value <= 0):
            beyond = math.inf
        elif math.isinf(self.bad):
            beyond = 1 - (self.bound + 1) / (value + 1)
        elif self.bound > 0:
            beyond = math.log(value / self.bound) / math.log(self.bad / self.bound)
        else:
            beyond = (value - self.bound) / (self.bad - self.bound)
        return min(1 + beyond, WORST) if verdict == "bad" else min(max(1 + beyond, 1.0), 2.0)


UNKNOWN = Range()


def final(logged: Sequence[float]) -> float:
    """Return the last value."""
    return logged[-1]


def best(logged: Sequence[float]) -> float:
    """Return the least of the finite values; NaN if there is none."""
    return min((value for value in logged if math.isfinite(value)), default=math.nan)


def peak(logged: Sequence[float]) -> float:
    """Return the largest value; NaN if one value is."""
    return math.nan if any(map(math.isnan, logged)) else max(logged)


def late_peak(logged: Sequence[float]) -> float:
    """Return the largest value in the last quarter; NaN if one value is. What was steered away does not count."""
    return peak(logged) if any(map(math.isnan, logged)) else max(logged[len(logged) * 3 // 4 :])


def lowest(logged: Sequence[float]) -> float:
    """Return the least value; NaN if one value is."""
    return math.nan if any(map(math.isnan, logged)) else min(logged)


def median(logged: Sequence[float]) -> float:
    """Return the median, on which the last few values of a schedule have no effect; NaN if one value is."""
    return math.nan if any(map(math.isnan, logged)) else statistics.median(logged)


def growth(logged: Sequence[float]) -> float:
    """Return the ratio of the last value to the first."""
    return logged[-1] / logged[0] if logged[0] else math.nan


def late_growth(logged: Sequence[float]) -> float:
    """Return the relative change over the last quarter of a run, in which a healthy RMS has levelled off."""
    earlier = logged[(len(logged) - 1) * 3 // 4]
    return logged[-1] / earlier - 1 if earlier else math.nan


def risen(logged: Sequence[float]) -> float:
    """Return how far the last value is above the best, relative to the best."""
    least = best(logged)
    return (logged[-1] - least) / abs(least) if least else math.nan


COUNT = "{:.0f}"  # how a number of events is written; of several runs the least and the most


@dataclass(frozen=True)
class Line:
    """A line of the report: what a run logged under a tag, reduced to one value."""

    label: str  # with `{group}` in it there is a line for each parameter group
    tags: str  # regular expression for the whole of a tag; of several tags in one line the largest value is shown
    reduce: Callable[[Sequence[float]], float] = median  # of the values in the order of the steps
    write: str = "{:.4g}"
    healthy: Range = UNKNOWN  # the first line of a quantity takes the quantity's range and advice
    advice: str = ""  # what a value outside of the range means, and what to do then
    only_half_precision: bool = False  # judged only in runs that keep weights in 16 bits
    of_any_length: bool = False  # judged in the shortest run too
    at_the_end: bool = False  # judged when the run is over: on its way there it need not hold


@dataclass(frozen=True)
class Chart:
    """A chart on TensorBoard's Custom Scalars page."""

    # The section of the page.
    category: Literal["Overview", "Health", "Updates", "Attention", "bfloat16", "Training", "Cost"]
    place: int  # in the section, from 1
    title: str  # the quantity, and what to look for
    tags: str  # regular expression for the whole of a tag
    # Lines in bands instead: of each the tags of the line, and of the lower and the upper end of its band.
    margins: tuple[tuple[str, str, str], ...] = ()

    @property
    def pattern(self) -> str:
        """The expression for TensorBoard, which only matches the beginning of a tag; a logger may add a prefix."""
        return f"(.+-)?({self.tags})$"

    def draws(self, tags: Iterable[str]) -> bool:
        """Return whether the chart draws one of the tags."""
        return any(re.match(self.pattern, tag) for tag in tags)


@dataclass(frozen=True)
class Panel:
    """A panel of the report's curves."""

    place: int  # from 1
    title: str  # the quantity, and which curve is which
    tags: tuple[str, ...]  # regular expressions, one for each line style; if there is only one, each tag has a style
    scale: Literal["linear", "log"] = "linear"
    shows_bound: bool = False  # a horizontal line marks the end of the healthy range, or the limit if none is known


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """An entry of the table: a quantity that a callback logs."""

    tag: str  # `…` stands for max, mean, min and for names of parameters or modules
    monitor: str  # the callback that logs it
    meaning: str  # what it is, with its formula in the letters of docs/reading-the-monitors.md
    unit: str
    usual: str = ""  # what is usual in a healthy run, besides the range
    healthy: Range = UNKNOWN  # by which the report judges
    limit: float | None = None  # beyond it the monitor warns by default
    problem: str = ""  # what it means outside of the healthy range
    advice: str  # what to do then
    chart: Chart | None = None
    panel: Panel | None = None
    report: tuple[Line, ...] = ()

    @property
    def name(self) -> str:
        """The tag up to its slash."""
        return self.tag.partition("/")[0]

    @property
    def limit_is_drawn(self) -> bool:
        """Whether its chart has the end of the healthy range as a line, where that does not flatten the others."""
        return self.healthy.bound is not None and self.chart is not None and (not self.panel or self.panel.shows_bound)

    @property
    def if_not(self) -> str:
        """What to say outside of the healthy range, the problem and the advice."""
        return ": ".join(filter(None, (self.problem, self.advice)))
