"""Runs side by side: what differs, a figure for each line of the report and each group, the verdicts, what to do."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_muon.report.differences import Column
from lightning_muon.report.groups import Group, group_runs
from lightning_muon.report.health import WORST_FIRST, Figure, figure, is_monitored, lines, not_finite
from lightning_muon.report.health import too_short as why_too_short
from lightning_muon.report.quantity import Line
from lightning_muon.report.ranking import Metric, metric_of
from lightning_muon.report.run_log import RunLog, RunLogError, find_runs, read_run, run_names
from lightning_muon.report.settings import read_settings
from lightning_muon.report.tags import name_of
from lightning_muon.report.verdict import NOT_MEASURED, RunHealth, RunVerdict, health_of


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, those that differ only in their seed as one group.

    Attributes:
        groups: The best first; those that are too short to judge come last.
        lines: Each line with its figure for each group; ``None`` where no run of it logged it.
        differences: What differs between the groups: the names of their ``settings``.
        too_short: Why each group cannot be judged; empty where it can.
        metric: What they are sorted by; ``None`` if no loss was logged.
    """

    groups: list[Group]
    lines: list[tuple[Line, list[Figure | None]]]
    differences: list[Column]
    too_short: list[str]
    metric: Metric | None = None

    @classmethod
    def of(cls, runs: Iterable[RunLog], metric: str | None = None) -> "Comparison":
        """Measure runs, and sort them by a metric; by default by their loss.

        Raises:
            RunLogError: If no run has logged the metric.
        """
        runs = list(runs)
        by = metric_of(runs, None if metric is None else name_of(metric))
        found, differences = group_runs(runs)
        pairs = sorted(
            ((group, _too_short(group)) for group in found),
            key=lambda pair: (bool(pair[1]), by.rank(pair[0]) if by else (True, 0.0)),
        )
        table = [
            (line, [figure(line, group.runs, is_judged=not too_short) for group, too_short in pairs])
            for line in lines(runs)
        ]
        return cls([group for group, _ in pairs], table, differences, [too_short for _, too_short in pairs], by)

    @property
    def runs(self) -> list[RunLog]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    def verdicts(self) -> list[RunVerdict]:
        """Return the verdict on each group."""
        return [self.verdict(column) for column in range(len(self.groups))]

    def verdict(self, column: int) -> RunVerdict:
        """Return the worst verdict of a group's figures; it is not ``ok`` if its health was not measured."""
        found = {one.verdict for _, figures in self.lines if (one := figures[column]) is not None}
        if "bad" in found:
            return "bad"
        if self.too_short[column]:
            return "too short to judge"
        if "watch" in found:
            return "watch"
        return "ok" if all(map(is_monitored, self.groups[column].runs)) else "not measured"

    def health(self, column: int) -> RunHealth:
        """Return the verdict on the first run of a group, with the step since which it holds."""
        return health_of(self.groups[column].runs[0])

    def remarks(self, column: int) -> list[str]:
        """Return the remarks on a group: damaged files, advice, and the messages of its runs."""
        runs = self.groups[column].runs
        damage = [line for run in runs for line in run.damage]
        messages = [(run, message) for run in runs for message in run.messages()]
        said = [message if len(runs) == 1 else f"{run.name}: {message}" for run, message in messages]
        return [*damage, *self.advice(column), *said]

    def advice(self, column: int) -> list[str]:
        """Return what to do about each figure of a group that is not healthy."""
        found = [f"{one.verdict}: {line.label} is {one.value}; {line.advice}" for line, one in self._unhealthy(column)]
        if tags := dict.fromkeys(tag for run in self.groups[column].runs for tag in not_finite(run)):
            found.append(f"not finite: {', '.join(tags)}")
        return found + self._not_judged(column)

    def summary(self) -> list[str]:
        """Return damaged files, and the advice of all groups, each once with the number of groups that it is for."""
        columns = range(len(self.groups))
        advice = Counter(
            f"{one.verdict}: {line.label}; {line.advice}" for column in columns for line, one in self._unhealthy(column)
        )
        advice.update(reason for column in columns for reason in self._not_judged(column))
        counted = [f"{number} of {len(columns)} {remark}" for remark, number in advice.most_common()]
        return [*(line for run in self.runs for line in run.damage), *counted]

    def _unhealthy(self, column: int) -> list[tuple[Line, Figure]]:
        found = ((line, figures[column]) for line, figures in self.lines if line.advice)
        unhealthy = [(line, one) for line, one in found if one is not None and one.verdict not in {"ok", None}]
        return sorted(unhealthy, key=lambda pair: WORST_FIRST.index(pair[1].verdict))

    def _not_judged(self, column: int) -> list[str]:
        if reason := self.too_short[column]:
            return [f"too short to judge: {reason}"]
        return [] if all(map(is_monitored, self.groups[column].runs)) else [NOT_MEASURED]


def compare(folders: Sequence[str | Path], limit: int, metric: str | None = None) -> Comparison:
    """Read the runs in and below folders, and measure them.

    Args:
        folders: Each a run, or a folder with runs below, such as that of a study.
        limit: The most runs to take; the ones written last.
        metric: The tag to sort by, such as ``val/accuracy``; by default the validation loss, or else another loss.

    Raises:
        RunLogError: If a folder has no run, or no run can be read, or none has the metric. If some can be read, a line
            on stderr names the others.
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
    named = [replace(run, name=name, settings=read_settings(run.path)) for run, name in zip(runs, names, strict=True)]
    return Comparison.of(named, metric)


def _too_short(group: Group) -> str:
    """Return why a group cannot be judged; empty if one of its runs can."""
    reasons = [why_too_short(run) for run in group.runs]
    return reasons[0] if all(reasons) else ""


def _naturally(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts ``version_2`` before ``version_10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
