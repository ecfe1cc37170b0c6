"""Runs side by side: a figure for each quantity of each run, the verdicts, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_muon.cli.health import not_finite, quantities
from lightning_muon.cli.quantity import Figure, Quantity, Verdict
from lightning_muon.cli.run_log import RunLog


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
