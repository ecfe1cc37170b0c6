"""The metric that runs are compared by, and which of its values is better."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_muon.report.groups import Group
from lightning_muon.report.health import mean_and_deviation
from lightning_muon.report.quantities import OTHER_LOSS, VALIDATION_LOSS, matching
from lightning_muon.report.run_log import RunLog, RunLogError

_LARGER_IS_BETTER = re.compile(
    r"(?!.*(loss|error))(.*[/_.-])?"
    r"(acc|accuracy|ap|auc|auroc|bleu|dice|f1|iou|map|mfu|\w*per_second|precision|psnr|r2|recall|rouge|score|ssim)"
    r"([/_.-].*|\d*)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Metric:
    """What runs are sorted by: the last value under a tag.

    Attributes:
        tag: Such as ``val/loss``.
        maximize: Whether larger values are better, by its name.
    """

    tag: str
    maximize: bool = False

    @classmethod
    def of(cls, tag: str) -> "Metric":
        """Return the metric under a tag."""
        return cls(tag, _LARGER_IS_BETTER.fullmatch(tag) is not None)

    def value(self, group: Group) -> float | None:
        """Return the mean of a group's runs; ``None`` if none of them logged it."""
        found = self._values(group)
        return statistics.fmean(found) if found else None

    def text(self, group: Group) -> str:
        """Return the mean ± standard deviation over a group's runs; empty if none of them logged it."""
        found = self._values(group)
        return mean_and_deviation(found, "{:#.4g}").removesuffix(".") if found else ""

    def rank(self, group: Group) -> tuple[bool, float]:
        """Return what the best group has the least of; groups without a finite value come last."""
        value = self.value(group)
        if value is None or not math.isfinite(value):
            return True, 0.0
        return False, -value if self.maximize else value

    def _values(self, group: Group) -> list[float]:
        return [values[-1] for run in group.runs if (values := run.values(self.tag))]


def metric_of(runs: Sequence[RunLog], tag: str | None = None) -> Metric | None:
    """Return what to compare runs by.

    Args:
        runs: All of them.
        tag: The one that was asked for; ``None`` for the validation loss if half of the runs have one, or else
            another loss.

    Returns:
        ``None`` if no run has logged a loss.

    Raises:
        RunLogError: If no run has logged the tag.
    """
    logged = Counter(tag for run in runs for tag in run.scalars)
    if tag is not None:
        if tag not in logged:
            raise RunLogError(f"no run has logged '{tag}'; there are {', '.join(_candidates(logged))}")
        return Metric.of(tag)
    losses = [_most_common(logged, pattern) for pattern in (VALIDATION_LOSS, OTHER_LOSS)]
    found = [loss for loss in losses if loss is not None]
    if not found:
        return None
    return Metric.of(found[0] if 2 * logged[found[0]] >= logged[found[-1]] else found[-1])


def _most_common(logged: Counter[str], pattern: str) -> str | None:
    """Return the tag of most runs; of several the shortest, which is the sum of the others."""
    return max(matching(logged, pattern), key=lambda tag: (logged[tag], -len(tag)), default=None)


def _candidates(logged: Counter[str]) -> list[str]:
    """Return the metrics that the user's module logs, as far as names tell; else all tags."""
    own = [tag for tag in logged if re.match(r"(train|val|valid|validation|eval|test)([/_.-]|$)", tag)]
    return own or list(logged)
