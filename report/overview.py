"""The overview of several runs: a row for each group, with what differs, its metric and its verdict."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from lightning_muon.report.comparison import Comparison
from lightning_muon.report.groups import Group

_LONGEST_NAME = 16
_SHORT_TITLE = 10  # which is not broken


@dataclass(frozen=True)
class Overview:
    """A table as texts.

    Attributes:
        titles: Of the columns.
        rows: The cells of each group, the best first; the last one is the verdict.
        keys: How many of the columns, from the left, say what differs.
        right: Which columns are numbers, and aligned at the right.
        is_narrow: Whether what differs is in one column, since it is too much for one each.
    """

    titles: list[str]
    rows: list[list[str]]
    keys: int
    right: set[int]
    is_narrow: bool = False


def overview(comparison: Comparison) -> Overview:
    """Return the table of the groups."""
    groups, metric = comparison.groups, comparison.metric
    columns = [
        (column.title, [group.settings[place] for group in groups])
        for place, column in enumerate(comparison.differences)
    ]
    names = [_run_names([run.name for run in group.runs]) for group in groups]
    is_short = all(len(name) <= _LONGEST_NAME for name in names)
    if is_short or len({group.settings for group in groups}) < len(groups):
        columns.insert(0, ("run", names))
    keys = len(columns)
    if any(len(group.runs) > 1 for group in groups):
        columns.append(("seeds", [_seeds(group) for group in groups]))
    elif len({group.seeds for group in groups}) > 1:
        columns.append(("seed", [group.seeds or "–" for group in groups]))
    if metric is not None:
        columns.append((metric.tag, [metric.text(group) or "–" for group in groups]))
    for unit in ("tokens", "samples"):
        speeds = [group_speed(group, unit) for group in groups]
        if any(speeds):
            columns.append((f"{unit}/s", [speed or "–" for speed in speeds]))
            break
    steps = [str(group.steps) for group in groups]
    if all(steps != cells for _, cells in columns):  # they may all be as many as was asked for
        columns.append(("steps", steps))
    right = {place for place, (_, cells) in enumerate(columns) if place >= keys or _are_numbers(cells)}
    columns.append(("verdict", list(comparison.verdicts())))
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    return Overview([title for title, _ in columns], rows, keys, right)


def group_speed(group: Group, unit: str) -> str:
    """Return the median of tokens or samples a second over a group's runs; empty if it was not logged."""
    rates = [rate for run in group.runs for rate in run.values(f"throughput/{unit}_per_second")]
    return f"{statistics.median(rates):,.0f}" if rates else ""


def fitting(table: Overview, width: int, comparison: Comparison) -> Overview:
    """Return a table that is not wider than so many characters: if need be what differs is in one column."""
    gap = 2  # between columns
    cells = [[row[place] for row in table.rows] for place in range(len(table.titles))]
    needed = [
        max(map(cell_len, [*broken(title, texts).split("\n"), *texts]))
        for title, texts in zip(table.titles, cells, strict=True)
    ]
    if table.keys < 2 or sum(needed) + gap * len(needed) <= width:
        return table
    rows = [[group.name, *row[table.keys :]] for group, row in zip(comparison.groups, table.rows, strict=True)]
    if table.titles[table.keys] == "seeds":
        for row, group in zip(rows, comparison.groups, strict=True):
            row[1] = str(len(group.runs))
    return Overview(
        ["settings", *table.titles[table.keys :]],
        rows,
        1,
        {place - table.keys + 1 for place in table.right if place >= table.keys},
        is_narrow=True,
    )


def _seeds(group: Group) -> str:
    return f"{len(group.runs)} ({group.seeds})" if group.seeds else str(len(group.runs))


def _run_names(names: Sequence[str]) -> str:
    """Return the names of the runs of a group, in one cell."""
    text = ", ".join(names)
    return text if len(text) <= _LONGEST_NAME else names[0] if len(names) == 1 else f"{names[0]}, …"


def _are_numbers(cells: Sequence[str]) -> bool:
    return all(cell[:1].isdigit() or cell[:1] in "–-." for cell in cells)


def broken(title: str, cells: Sequence[str]) -> str:
    """Return the title of a column in lines that are not wider than its cells, as far as it has places to break it."""
    width = max(_SHORT_TITLE, *map(cell_len, cells))
    lines = [""]
    for part in re.split(r"(?<=[_/.])|(?<=, )", title):
        if lines[-1] and cell_len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
