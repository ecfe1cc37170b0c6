"""The health of a run in figures: what is measured, what is healthy, and what to do where it is not."""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_muon.cli.run_log import RunLog

Verdict = Literal["ok", "watch", "bad"]

_LOSS = re.compile(r"^(?!.*unigram).*loss")


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


def quantities(runs: Iterable[RunLog]) -> list[Quantity]:
    """Return the lines that have a value in at least one run."""
    runs = list(runs)
    losses = dict.fromkeys(tag for run in runs for tag in run.scalars if _LOSS.match(tag))
    lines = [STEPS, *(line for tag in losses for line in _loss(tag)), *HEALTH]
    return [line for line in lines if any(line.measure(run) is not None for run in runs)]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: In the order of the columns.
        lines: Each quantity with its figure for each run; ``None`` where a run did not log it.
    """

    runs: list[RunLog]
    lines: list[tuple[Quantity, list[Figure | None]]]

    @classmethod
    def of(cls, runs: Iterable[RunLog]) -> "Comparison":
        """Measure runs."""
        runs = list(runs)
        return cls(runs, [(line, [line.figure(run) for run in runs]) for line in quantities(runs)])

    def verdicts(self) -> list[Verdict]:
        """Return the verdict on each run: the worst of its figures."""
        return [self._verdict(column) for column in range(len(self.runs))]

    def advice(self, column: int) -> list[str]:
        """Return what to do about each figure of a run that is not healthy."""
        found: list[str] = []
        for line, figures in self.lines:
            figure = figures[column]
            if figure is not None and figure.verdict in {"watch", "bad"}:
                advice = f"; {line.advice}" if line.advice else ""
                found.append(f"{figure.verdict}: {line.label} is {figure.value}{advice}")
        if tags := not_finite(self.runs[column]):
            found.append(f"not finite: {', '.join(tags)}")
        return found

    def _verdict(self, column: int) -> Verdict:
        found = {figure.verdict for _, figures in self.lines if (figure := figures[column]) is not None}
        return "bad" if "bad" in found else "watch" if "watch" in found else "ok"


def values(run: RunLog, tag: str) -> list[float]:
    """Return what a run logged under a tag, in the order of the steps."""
    return [value for _, value in run.scalars.get(tag, [])]


def _of(tag: str, reduce: Callable[[Sequence[float]], float]) -> Callable[[RunLog], float | None]:
    """Measure by a reduction over what was logged."""

    def measure(run: RunLog) -> float | None:
        logged = values(run, tag)
        return reduce(logged) if logged else None

    return measure


def _final(logged: Sequence[float]) -> float:
    return logged[-1]


def _best(logged: Sequence[float]) -> float:
    return min((value for value in logged if math.isfinite(value)), default=math.nan)


def _peak(logged: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in logged) else max(logged)


def _median(logged: Sequence[float]) -> float:
    """Return the median, in which a few values at the end of a schedule do not count; NaN if one value is."""
    return math.nan if any(math.isnan(value) for value in logged) else statistics.median(logged)


def _growth(logged: Sequence[float]) -> float:
    return logged[-1] / logged[0] if logged[0] else math.nan


def _late_growth(logged: Sequence[float]) -> float:
    """Return the relative change over the last quarter of a run, in which a healthy RMS has levelled off."""
    earlier = logged[(len(logged) - 1) * 3 // 4]
    return logged[-1] / earlier - 1 if earlier else math.nan


def _risen(logged: Sequence[float]) -> float:
    """Return how far the last value is above the best, relative to that."""
    best = _best(logged)
    return (logged[-1] - best) / abs(best) if best else math.nan


def _above(watch: float, bad: float) -> Callable[[float], Verdict]:
    return lambda value: "bad" if value > bad else "watch" if value > watch else "ok"


def _below(watch: float, bad: float) -> Callable[[float], Verdict]:
    return lambda value: "bad" if value < bad else "watch" if value < watch else "ok"


def _loss(tag: str) -> list[Quantity]:
    lines = [
        Quantity(f"{tag}, final", "", _of(tag, _final)),
        Quantity(f"{tag}, best", "", _of(tag, _best)),
    ]
    if tag.startswith("val"):
        advice = "the validation loss rose from its best: the model overfits, or diverges; take the best checkpoint"
        risen = _of(tag, _risen)
        lines.append(Quantity(f"{tag}, above its best", "under 2 %", risen, _above(0.02, 0.2), advice, _percent))
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _signed_percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _last_step(run: RunLog) -> float | None:
    return max((logged[-1][0] for logged in run.scalars.values() if logged), default=None)


def _ramps(run: RunLog) -> float | None:
    """Return how often the weight decay of a group began to rise: what AutoWeightDecay does when it acts."""
    curves = [values(run, tag) for tag in run.scalars if tag.startswith("weight_decay/")]
    if not curves:
        return None
    return max(_rises(curve) for curve in curves)


def _rises(curve: Sequence[float]) -> int:
    """Return the number of stretches over which a curve rises."""
    rising = [new > old for old, new in itertools.pairwise(curve)]
    return sum(now and not before for before, now in zip([False, *rising], rising, strict=False))


def _warnings(run: RunLog) -> float | None:
    return None if run.texts is None else len(run.texts.get("warnings", []))


def not_finite(run: RunLog) -> list[str]:
    """Return the tags under which a run logged NaN or infinity."""
    return [tag for tag, logged in run.scalars.items() if not all(math.isfinite(value) for _, value in logged)]


STEPS = Quantity("last step", "", _last_step, show="{:.0f}".format)

# The ranges are those of the README's "Read the monitors".
HEALTH = (
    Quantity(
        "tags with NaN or infinity",
        "0",
        lambda run: len(not_finite(run)),
        _above(0, 0),
        "a value is not finite from some step on: go back to a checkpoint before it, lower the learning rate or clip",
        "{:.0f}".format,
    ),
    Quantity(
        "weight RMS, peak of the largest",
        "under 1",
        _of("weight_rms/max", _peak),
        _above(1.0, 4.0),
        "the weights are large: raise weight_decay, or add AutoWeightDecay",
    ),
    Quantity("weight RMS, final of the largest", "", _of("weight_rms/max", _final)),
    Quantity("weight RMS, growth since the start", "", _of("weight_rms/max", _growth), show="×{:.3g}".format),
    Quantity(
        "weight RMS, growth in the last quarter",
        "under 10 %",
        _of("weight_rms/max", _late_growth),
        _above(0.1, 1.0),
        "the weights still grow: harmless in a short run; in a long one raise weight_decay, or add AutoWeightDecay",
        _signed_percent,
    ),
    Quantity("largest weight", "", _of("weight_absmax/max", _final)),
    Quantity(
        "bf16 headroom, median of the smallest",
        "above 1",
        _of("bf16_headroom/min", _median),
        _below(1.0, 0.5),
        "bfloat16 weights would lose updates: keep weights in float32 (bf16-mixed, not bf16-true), or decay more",
    ),
    Quantity("updates that bf16 would lose", "", _of("lost_updates/mean", _median), show=_percent),
    Quantity(
        "orthogonality error, median of the mean",
        "up to 0.7",
        _of("orthogonality_error/mean", _median),
        _above(0.7, 0.9),
        "updates have lost rank: look at the gradients of the worst layer, by per_parameter",
    ),
    Quantity("orthogonality error, largest", "", _of("orthogonality_error/max", _peak)),
    Quantity("singular value of the update, smallest", "", _of("singular_value_min/min", _median)),
    Quantity("singular value of the update, largest", "", _of("singular_value_max/max", _median)),
    Quantity("condition number of the gradient, median", "", _of("gradient_condition/mean", _median)),
    Quantity("stable rank of the gradient, median", "", _of("gradient_stable_rank/mean", _median)),
    Quantity(
        "weight decay, ramps",
        "0",
        _ramps,
        _above(0, math.inf),
        "AutoWeightDecay had to act, or a schedule did: the decisions say why",
        "{:.0f}".format,
    ),
    Quantity("optimizer's share of the step", "", _of("optimizer_share", _median), show=_percent),
    Quantity(
        "warnings", "0", _warnings, _above(0, math.inf), "the monitors warned: see the list", show="{:.0f}".format
    ),
)
