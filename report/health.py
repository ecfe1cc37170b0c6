"""The health of a run: a figure for each line of the report, with its verdict."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from lightning_muon.report.quantities import OWN_LOSS, QUANTITIES, VALIDATION_LOSS, matching
from lightning_muon.report.quantity import UNKNOWN, Line, Quantity, Range, Verdict, best, final, risen
from lightning_muon.report.run_log import RunLog


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


def lines(runs: Iterable[RunLog]) -> list[Line]:
    """Return the lines that have a value in at least one run."""
    runs = list(runs)
    tags = list(chain.from_iterable(run.scalars for run in runs))
    losses = chain.from_iterable(map(_lines_of_loss, matching(tags, OWN_LOSS)))
    table = chain.from_iterable(_lines_of_quantity(quantity, tags) for quantity in QUANTITIES)
    return [line for line in [*COUNTS, *losses, *table] if any(_measure(line, run) is not None for run in runs)]


def figure(line: Line, run: RunLog) -> Figure | None:
    """Return the value of a line in a run with its verdict; NaN and infinity are always bad."""
    value = _measure(line, run)
    if value is None:
        return None
    if not math.isfinite(value):
        return Figure(f"{value:g}", "bad")
    is_judged = not line.only_half_precision or _may_be_in_half_precision(run)
    shown = line.write.format(value).replace("%", " %")
    return Figure(shown, line.healthy.judge(value) if is_judged else None)


def not_finite(run: RunLog) -> list[str]:
    """Return the tags under which a run logged NaN or infinity."""
    return [tag for tag in run.scalars if not all(map(math.isfinite, run.values(tag)))]


def is_monitored(run: RunLog) -> bool:
    """Return whether a run logged a quantity of health whose range is known."""
    return any(
        matching(run.scalars, line.tags)
        for quantity in QUANTITIES
        if quantity.healthy is not UNKNOWN and quantity.chart is not None and quantity.chart.category == "Health"
        for line in quantity.report[:1]  # the one that the range is for
    )


def _lines_of_loss(tag: str) -> Iterator[Line]:
    pattern = re.escape(tag)
    yield Line(f"{tag}, final", pattern, final)
    yield Line(f"{tag}, best", pattern, best)
    if matching([tag], VALIDATION_LOSS):
        advice = "the validation loss rose from its best: the model overfits, or diverges; take the best checkpoint"
        yield Line(f"{tag}, above its best", pattern, risen, "{:.1%}", Range("under 2 %", 0.02, bad=0.2), advice)


def _lines_of_quantity(quantity: Quantity, tags: Iterable[str]) -> Iterator[Line]:
    for place, given in enumerate(quantity.report):
        line = given if place else replace(given, healthy=quantity.healthy, advice=quantity.if_not)
        if "{group}" in line.label:
            for tag in matching(tags, line.tags):
                yield replace(line, label=line.label.format(group=tag.partition("/")[2]), tags=re.escape(tag))
        else:
            yield line


def _measure(line: Line, run: RunLog) -> float | None:
    """Return the value of a line; ``None`` if the run did not log it."""
    if line in COUNTS:
        return COUNTS[line](run)
    return max((line.reduce(run.values(tag)) for tag in matching(run.scalars, line.tags)), default=None)


def _may_be_in_half_precision(run: RunLog) -> bool:
    """Return whether the run's weights had 16 bits, or the run did not log how many they had."""
    bits = run.values("weight_bits")
    return not bits or min(bits) <= 16


def _last_step(run: RunLog) -> float | None:
    return max((logged[-1][0] for logged in run.scalars.values() if logged), default=None)


def _count_texts(tag: str, run: RunLog) -> float | None:
    return None if run.texts is None else len(run.texts.get(tag, []))


def _count(label: str, healthy: Range = UNKNOWN, advice: str = "") -> Line:
    return Line(label, "", final, "{:.0f}", healthy, advice)


# Lines about the run as a whole, with their measurement.
COUNTS: dict[Line, Callable[[RunLog], float | None]] = {
    _count("last step"): _last_step,
    _count(
        "tags with NaN or infinity",
        Range("0", 0, bad=0),
        "a value is not finite from some step on: go back to a checkpoint before it, lower the learning rate or clip",
    ): lambda run: len(not_finite(run)),
    _count("warnings", Range("0", 0)): partial(_count_texts, "warnings"),  # their texts are advice enough
    _count("decisions about the weight decay"): partial(_count_texts, "weight_decay/decisions"),
}
