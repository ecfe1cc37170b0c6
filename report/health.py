"""The health of a run: a figure for each line of the report, with its verdict."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from lightning_muon.report.quantities import LEARNING_RATE, OWN_LOSS, QUANTITIES, VALIDATION_LOSS, matching
from lightning_muon.report.quantity import COUNT, UNKNOWN, Line, Quantity, Range, Verdict, best, final, risen
from lightning_muon.report.run_log import RunLog

# A verdict is one on momentum, weights and losses that have settled. With the usual momentum of 0.95 an average reaches
# 1 / (1 - 0.95) = 20 steps back: after three times as many it has 95 % of its weight, and the first gradients, those of
# a random model, no more than 5 %.
MIN_STEPS = 60
# The last quarter of a run, in which sizes are to have levelled off, has a beginning and an end from four values on.
MIN_VALUES = 4

WORST_FIRST: tuple[Verdict | None, ...] = ("bad", "watch", "costly", "ok", None)
_JUDGED = [
    quantity.report[0].tags  # the line that the range is for
    for quantity in QUANTITIES
    if quantity.report
    and quantity.healthy is not UNKNOWN
    and quantity.chart is not None
    and quantity.chart.category == "Health"
]


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
    return [line for _, line in named_lines(runs)]


def named_lines(runs: Iterable[RunLog]) -> list[tuple[str, Line]]:
    """Return the lines that have a value in at least one run, each with the name of its quantity."""
    runs = list(runs)
    tags = list(chain.from_iterable(run.scalars for run in runs))
    counts = [(COUNTED[line.label], line) for line in COUNTS]
    losses = [("loss", line) for tag in matching(tags, OWN_LOSS) for line in _lines_of_loss(tag)]
    table = [(entry.name, line) for entry in QUANTITIES for line in _lines_of_quantity(entry, tags)]
    return [
        (name, line) for name, line in [*counts, *losses, *table] if any(measure(line, run) is not None for run in runs)
    ]


def figure(line: Line, runs: Sequence[RunLog], *, is_judged: bool = True) -> Figure | None:
    """Return the value of a line, with its verdict.

    Args:
        line: What to measure.
        runs: One, or several that differ in their seeds: their mean ± standard deviation, and the worst verdict.
        is_judged: Whether they ran long enough. NaN and infinity are always bad.

    Returns:
        ``None`` if none of the runs logged it.
    """
    found = [(value, run) for run in runs if (value := measure(line, run)) is not None]
    if not found:
        return None
    verdicts = [judge(line, value, run) for value, run in found if is_judged or _at_any_length(line, value)]
    worst = min(verdicts, key=WORST_FIRST.index, default=None)
    return Figure(_written(line.write, [value for value, _ in found]), worst)


def mean_and_deviation(values: Sequence[float], write: str = "{:.4g}") -> str:
    """Return the mean with the standard deviation of the sample, such as ``1.790 ± 0.012``; one value has none."""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else 0.0
    if not deviation:
        return write.format(mean)
    places = 1 - math.floor(math.log10(deviation))
    if 0 < places <= 6 and abs(mean) < 1e4:
        return f"{mean:.{places}f} ± {deviation:.{places}f}"
    return f"{mean:.4g} ± {deviation:.2g}"


def too_short(run: RunLog) -> str:
    """Return why a run cannot be judged yet; empty if it can."""
    if run.steps < MIN_STEPS:
        return f"{_plural(run.steps, 'step')}; a verdict needs {MIN_STEPS}"
    if (rising := _rising_rate(run)) is not None:
        return f"the learning rate still rises at step {rising}, in its warm-up"
    logged = [len(run.scalars[tag]) for tag in chain.from_iterable(matching(run.scalars, tags) for tags in _JUDGED)]
    if logged and max(logged) < MIN_VALUES:
        return f"its health was measured at {_plural(max(logged), 'step')}; a verdict needs {MIN_VALUES}"
    return ""


def not_finite(run: RunLog) -> list[str]:
    """Return the tags under which a run logged NaN or infinity."""
    return [tag for tag in run.scalars if not all(map(math.isfinite, run.values(tag)))]


def is_monitored(run: RunLog) -> bool:
    """Return whether a run logged a quantity of health whose range is known."""
    return any(matching(run.scalars, tags) for tags in _JUDGED)


def judge(line: Line, value: float, run: RunLog) -> Verdict | None:
    """Return the verdict on a line's value in a run; ``None`` where no range is known, or it does not matter there."""
    if not math.isfinite(value):
        return "bad"
    if line.only_half_precision and not _may_be_in_half_precision(run):
        return None
    return line.healthy.judge(value)


def _at_any_length(line: Line, value: float) -> bool:
    return line.of_any_length or not math.isfinite(value)


def _written(write: str, values: Sequence[float]) -> str:
    """Return values of one line as they are shown: of counts the range, of others mean ± standard deviation."""
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return f"{mean:g}"
    if write == COUNT:
        low, high = (write.format(value) for value in (min(values), max(values)))
        return low if low == high else f"{low}–{high}"
    if write == "{:.4g}":
        return mean_and_deviation(values)
    text = _spaced(write.format(mean))
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    # Without what the line has before or after its number, such as the sign of a growth.
    plain = "{:.1%}" if "%" in write else write if write == "{:,.0f}" else "{:.2g}"
    if plain.format(deviation) == plain.format(0.0):
        return text
    return f"{text} ± {_spaced(plain.format(deviation))}"


def _spaced(text: str) -> str:
    return text.replace("%", " %")


def _rising_rate(run: RunLog) -> int | None:
    """Return the last step of a run in which all learning rates have only risen until then; else ``None``."""
    rates = [run.scalars[tag] for tag in matching(run.scalars, LEARNING_RATE)]
    rising = [logged for logged in rates if logged[-1][1] > max((value for _, value in logged[:-1]), default=math.inf)]
    return max(logged[-1][0] for logged in rising) if rising and len(rising) == len(rates) else None


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


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


def measure(line: Line, run: RunLog) -> float | None:
    """Return the value of a line; ``None`` if the run did not log it."""
    if line in COUNTS:
        return COUNTS[line](run)
    return max((line.reduce(run.values(tag)) for tag in matching(run.scalars, line.tags)), default=None)


def _may_be_in_half_precision(run: RunLog) -> bool:
    """Return whether the run's weights had 16 bits, or the run did not log how many they had."""
    bits = run.values("weight_bits")
    return not bits or min(bits) <= 16


def _count_texts(tag: str, run: RunLog) -> float | None:
    return None if run.texts is None else len(run.texts.get(tag, []))


def _count(label: str, healthy: Range = UNKNOWN, advice: str = "") -> Line:
    return Line(label, "", final, COUNT, healthy, advice, of_any_length=True)


# The names of these lines, as those of quantities.
COUNTED = {
    "steps": "steps",
    "tags with NaN or infinity": "not_finite",
    "warnings": "warnings",
    "decisions about the weight decay": "decisions",
}
# Lines about the run as a whole, with their measurement.
COUNTS: dict[Line, Callable[[RunLog], float | None]] = {
    _count("steps"): lambda run: run.steps,
    _count(
        "tags with NaN or infinity",
        Range("0", 0, bad=0),
        "a value is not finite from some step on: go back to a checkpoint before it, lower the learning rate or clip",
    ): lambda run: len(not_finite(run)),
    _count("warnings", Range("0", 0)): partial(_count_texts, "warnings"),  # their texts are advice enough
    _count("decisions about the weight decay"): partial(_count_texts, "weight_decay/decisions"),
}
