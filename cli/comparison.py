"""Runs side by side: a figure for each quantity of each run, the verdicts, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_muon.cli.health import HEALTH, WARNINGS, not_finite, quantities
from lightning_muon.cli.quantity import UNKNOWN, Figure, Quantity, Verdict
from lightning_muon.cli.run_log import RunLog

RunVerdict = Verdict | Literal["not measured"]
_UNWATCHED = (
    "not measured: no monitor has logged this run's health; add WeightRMSMonitor, OrthogonalityMonitor and the like to"
    " its callbacks"
)


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

    def verdicts(self) -> list[RunVerdict]:
        """Return the verdict on each run."""
        return [self.verdict(column) for column in range(len(self.runs))]

    def verdict(self, column: int) -> RunVerdict:
        """Return the worst of a run's figures; it is not ``ok`` if the run's health was not measured."""
        found = {figure.verdict for _, figures in self.lines if (figure := figures[column]) is not None}
        if "bad" in found:
            return "bad"
        if "watch" in found:
            return "watch"
        return "ok" if self._is_monitored(column) else "not measured"

    def remarks(self, column: int) -> list[str]:
        """Return what there is to say of a run: files that are damaged, what to do, and what the run itself said."""
        run = self.runs[column]
        return [*run.damage, *self.advice(column), *run.said()]

    def advice(self, column: int) -> list[str]:
        """Return what to do about each figure of a run that is not healthy."""
        found: list[str] = []
        for line, figures in self.lines:
            figure = figures[column]
            if line is not WARNINGS and figure is not None and figure.verdict in {"watch", "bad"}:
                advice = f"; {line.advice}" if line.advice else ""
                found.append(f"{figure.verdict}: {line.label} is {figure.value}{advice}")
        if tags := not_finite(self.runs[column]):
            found.append(f"not finite: {', '.join(tags)}")
        if not self._is_monitored(column):
            found.append(_UNWATCHED)
        return found

    def _is_monitored(self, column: int) -> bool:
        judged = [figures[column] for line, figures in self.lines if line in HEALTH and line.healthy is not UNKNOWN]
        return any(figure is not None for figure in judged)
