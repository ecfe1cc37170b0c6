"""Runs side by side: a figure for each line of the report and each run, the verdicts, and what to do."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lightning_muon.report.health import Figure, figure, is_monitored, lines, not_finite
from lightning_muon.report.quantity import Line
from lightning_muon.report.run_log import RunLog, RunLogError, find_runs, read_run, run_names

RunVerdict = Literal["ok", "watch", "bad", "not measured"]
_NOT_MEASURED = (
    "not measured: no monitor has logged this run's health; add WeightRMSMonitor, OrthogonalityMonitor and the like to"
    " its callbacks"
)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: In the order of the columns.
        lines: Each line with its figure for each run; ``None`` where a run did not log it.
    """

    runs: list[RunLog]
    lines: list[tuple[Line, list[Figure | None]]]

    @classmethod
    def of(cls, runs: Iterable[RunLog]) -> "Comparison":
        """Measure runs."""
        runs = list(runs)
        return cls(runs, [(line, [figure(line, run) for run in runs]) for line in lines(runs)])

    def verdicts(self) -> list[RunVerdict]:
        """Return the verdict on each run."""
        return [self.verdict(column) for column in range(len(self.runs))]

    def verdict(self, column: int) -> RunVerdict:
        """Return the worst verdict of a run's figures; it is not ``ok`` if the run's health was not measured."""
        found = {one.verdict for _, figures in self.lines if (one := figures[column]) is not None}
        if "bad" in found:
            return "bad"
        if "watch" in found:
            return "watch"
        return "ok" if is_monitored(self.runs[column]) else "not measured"

    def remarks(self, column: int) -> list[str]:
        """Return the remarks on a run: damaged files, advice, and the messages of the run itself."""
        run = self.runs[column]
        return [*run.damage, *self.advice(column), *run.messages()]

    def advice(self, column: int) -> list[str]:
        """Return what to do about each figure of a run that is not healthy."""
        found: list[str] = []
        for line, figures in self.lines:
            one = figures[column]
            if line.advice and one is not None and one.verdict not in {"ok", None}:
                found.append(f"{one.verdict}: {line.label} is {one.value}; {line.advice}")
        if tags := not_finite(self.runs[column]):
            found.append(f"not finite: {', '.join(tags)}")
        if not is_monitored(self.runs[column]):
            found.append(_NOT_MEASURED)
        return found


def compare(folders: Sequence[str | Path], limit: int) -> Comparison:
    """Read the runs in and below folders, and measure them.

    Args:
        folders: Each a run, or a folder with runs below.
        limit: The most runs to take; the ones written last.

    Raises:
        RunLogError: If a folder has no run, or no run can be read. If some can, a line on stderr names the others.
    """
    found = find_runs(folders)
    runs: list[RunLog] = []
    empty: list[RunLog] = []
    for path in found:
        if len(runs) == limit:
            print(f"the {limit} latest of {len(found)} runs are shown; --limit {len(found)} shows all", file=sys.stderr)
            break
        try:
            run = read_run(path, str(path))
        except RunLogError as error:
            if len(found) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)
        else:
            (runs if run.scalars else empty).append(run)
    if not runs:
        raise RunLogError(f"no run in {', '.join(repr(str(folder)) for folder in folders)} has logged a value yet")
    if empty:
        print(f"left out, since nothing was logged there: {', '.join(run.name for run in empty)}", file=sys.stderr)
    runs.sort(key=lambda run: _naturally(run.path))
    names = run_names([run.path for run in runs])
    return Comparison.of(replace(run, name=name) for run, name in zip(runs, names, strict=True))


def _naturally(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts ``version_2`` before ``version_10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
