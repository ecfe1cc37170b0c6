"""The overview of several runs: a row for each group, with what differs, its metric and its verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from lightning_muon.report.comparison import Comparison

_LONGEST_NAME = 16


@dataclass(frozen=True)
class Overview:
    """A table as texts.

    Attributes:
        titles: Of the columns.
        rows: The cells of each group, the best first; the last one is the verdict.
        keys: How many of the columns, from the left, say what differs.
        right: Which columns are numbers, and aligned at the right.
    """

    titles: list[str]
    rows: list[list[str]]
    keys: int
    right: set[int]


def overview(comparison: Comparison) -> Overview:
    """Return the table of the groups."""
    groups, columns = comparison.groups, {}
    for place, column in enumerate(comparison.differences):
        columns[column.title] = [group.settings[place] for group in groups]
    keys = len(columns)
    names = [_run_names([run.name for run in group.runs]) for group in groups]
    settings = [group.settings for group in groups]
    is_short = all(len(name) <= _LONGEST_NAME for name in names)
    if is_short or len(set(settings)) < len(groups):
        columns = {"run": names, **columns}
        keys += 1
    left = len(columns)
    several = any(len(group.runs) > 1 for group in groups)
    if several:
        columns["seeds"] = [
            f"{len(group.runs)} ({group.seeds})" if group.seeds else str(len(group.runs)) for group in groups
        ]
    elif len({group.seeds for group in groups}) > 1:
        columns["seed"] = [group.seeds or "–" for group in groups]
    if comparison.metric is not None:
        columns[comparison.metric.tag] = [comparison.metric.text(group) or "–" for group in groups]
    steps = [str(group.steps) for group in groups]
    if steps not in columns.values():
        columns["steps"] = steps
    columns["verdict"] = list(comparison.verdicts())
    titles = list(columns)
    right = {place for place, cells in enumerate(columns.values()) if place >= left or _are_numbers(cells)}
    return Overview(titles, [list(row) for row in zip(*columns.values(), strict=True)], keys, right - {len(titles) - 1})


def fitting(table: Overview, width: int, comparison: Comparison) -> Overview:
    """Return a table that is not wider than so many characters: if need be what differs is in one column."""
    gap = 2  # between columns
    needed = [
        max(cell_len(text) for text in [*broken(title, 0).split("\n"), *(row[place] for row in table.rows)])
        for place, title in enumerate(table.titles)
    ]
    if table.keys < 2 or sum(needed) + gap * len(needed) <= width:
        return table
    names = [group.name for group in comparison.groups]
    return Overview(
        ["settings", *table.titles[table.keys :]],
        [[name, *row[table.keys :]] for name, row in zip(names, table.rows, strict=True)],
        1,
        {place - table.keys + 1 for place in table.right if place >= table.keys},
    )


def _run_names(names: Sequence[str]) -> str:
    """Return the names of the runs of a group, in one cell."""
    text = ", ".join(names)
    return text if len(text) <= _LONGEST_NAME else names[0] if len(names) == 1 else f"{names[0]}, …"


def _are_numbers(cells: Sequence[str]) -> bool:
    return all(cell[:1].isdigit() or cell[:1] in "–-." for cell in cells)


def broken(title: str, width: int) -> str:
    """Return a title in lines of at most so many characters, as far as it has places to break it."""
    lines = [""]
    for part in title.replace("_", "_\0").replace("/", "/\0").replace(", ", ",\0").replace(".", ".\0").split("\0"):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
