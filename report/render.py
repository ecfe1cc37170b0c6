"""A comparison of runs as tables for a terminal, and as files: Markdown, and curves where matplotlib is installed."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_muon.report.comparison import Comparison
from lightning_muon.report.curves import COLOURED, draw_curves
from lightning_muon.report.health import Figure
from lightning_muon.report.orthogonality_map import OrthogonalityMap, draw_map, written
from lightning_muon.report.overview import broken, fitting, group_speed, overview
from lightning_muon.report.picture import draw_picture
from lightning_muon.report.plain_text import code, printable, table_row
from lightning_muon.report.plain_text import markdown as as_markdown
from lightning_muon.report.quantities import OWN_LOSS, matching
from lightning_muon.report.quantity import best
from lightning_muon.report.replaced import replaced

PAGE, PLOT = "report.md", "curves.png"
COLOURS = {
    "ok": "green",
    "costly": "yellow",
    "watch": "yellow",
    "bad": "red",
    "not measured": "yellow",
    "too short to judge": "",
    None: "",
}
# Characters of the names of runs, at most, and of labels, where more room is not left: longer ones are wrapped.
NAME_WIDTH, LABEL_WIDTH = 16, 24


SIDE_BY_SIDE = 5  # the most groups in a table of the page
_MOST_ROWS = 30  # in a terminal
_NUMBER = re.compile(r"[-\d.e]+( ± [-\d.e]+)?")
_NARROW_VERDICT = 12
_PIPE_WIDTH = 240  # characters, in a file or a pipe: a row stays a line


class ReportFileError(ValueError):
    """The report cannot be written; the message is one line for the user."""


def print_comparison(comparison: Comparison, *, figures: bool = False) -> None:
    """Print the runs, the best first, with loss, speed and verdict, and what to do.

    Args:
        comparison: The runs.
        figures: Print the table of all figures too, if it is not too wide.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_PIPE_WIDTH)
    if len(comparison.groups) > 1:
        _print_overview(console, comparison)
    else:
        _print_run(console, comparison)
    columns = range(len(comparison.groups))
    label_width = _label_width(comparison, columns, console.width)
    if label_width is None and len(columns) > 1:
        for remark in comparison.summary():
            _print_line(console, f"- {remark}")
        _print_line(console, f"{PAGE} has the health of each, side by side")
        return
    if figures:
        console.print(_table(comparison, columns, label_width or LABEL_WIDTH))
        for group in comparison.groups:
            if (found := OrthogonalityMap.of_run(group.runs[0])) is not None:
                name = f"{group.name}, " if len(comparison.groups) > 1 else ""
                _print_line(console, f"{name}{found.introduction}")
                console.print(_map_table(found))
    for column, group in enumerate(comparison.groups):
        remarks = comparison.remarks(column)
        if remarks and len(comparison.groups) > 1:
            console.print(Text(group.name, "bold"))
        for remark in remarks:
            _print_line(console, f"- {remark}")


def write_report(comparison: Comparison, folder: Path) -> tuple[list[Path], str | None]:
    """Write ``report.md``, ``curves.png`` and pictures of the first runs, ``health-1.png``, ``orthogonality-1.png``.

    A file is replaced only when its successor is complete.

    Args:
        comparison: The runs.
        folder: Where to write; it is made if it does not exist.

    Returns:
        What was written; and why there is no plot, if there is none.

    Raises:
        ReportFileError: If the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / PLOT) as unfinished:
            no_plot = draw_curves(comparison.groups, unfinished)
        pictures = [] if no_plot else [f"health-{place}.png" for place in range(1, len(comparison.groups) + 1)]
        for column, picture in enumerate(pictures[:SIDE_BY_SIDE]):
            with replaced(folder / picture) as unfinished:
                draw_picture(comparison.groups[column].runs[0], comparison.health(column), unfinished)
        maps: dict[int, str] = {}
        for column, _ in enumerate(pictures[:SIDE_BY_SIDE]):
            if (found := OrthogonalityMap.of_run(comparison.groups[column].runs[0])) is not None:
                maps[column] = f"orthogonality-{column + 1}.png"
                with replaced(folder / maps[column]) as unfinished:
                    draw_map(comparison.groups[column].name, found, unfinished)
        with replaced(folder / PAGE) as unfinished:
            plot = None if no_plot else PLOT
            unfinished.write_text(markdown(comparison, plot, pictures[:SIDE_BY_SIDE], maps), encoding="utf-8")
    except OSError as error:
        raise ReportFileError(
            f"cannot write the report to '{folder}': {error.strerror}; --output names another folder"
        ) from error
    drawn = [] if no_plot else [PLOT, *pictures[:SIDE_BY_SIDE], *maps.values()]
    return [folder / name for name in (PAGE, *drawn)], no_plot


def _print_line(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False)


def _print_run(console: Console, comparison: Comparison) -> None:
    """Print how good one run is, how fast, and its verdict."""
    group, health = comparison.groups[0], comparison.health(0)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("run", Text(group.name))
    table.add_row("steps", str(group.steps))
    for tag in matching(group.runs[0].scalars, OWN_LOSS):
        values = group.runs[0].values(tag)
        table.add_row(Text(printable(tag)), f"{values[-1]:.4g}, best {best(values):.4g}")
    for unit in ("tokens", "samples"):
        if speed := group_speed(group, unit):
            table.add_row("speed", f"{speed} {unit} a second")
            break
    headline = health.headline if len(group.runs) == 1 else comparison.verdict(0)
    table.add_row("verdict", Text(printable(headline), COLOURS[comparison.verdict(0)]))
    console.print(table)


def _print_overview(console: Console, comparison: Comparison) -> None:
    """Print a row for each group."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.title = Text(_title(comparison))
    found = fitting(overview(comparison), console.width, comparison)
    for place, title in enumerate(found.titles):
        cells = [row[place] for row in found.rows]
        side: Literal["left", "right"] = "right" if place in found.right else "left"
        widest = _NARROW_VERDICT if found.is_narrow and place == len(found.titles) - 1 else None
        table.add_column(Text(broken(title, cells)), justify=side, overflow="fold", max_width=widest)
    most = _MOST_ROWS if console.is_terminal else len(found.rows)
    for row in found.rows[:most]:
        table.add_row(*map(Text, row[:-1]), Text(row[-1], COLOURS[row[-1]]))
    console.print(table)
    if hidden := Counter(row[-1] for row in found.rows[most:]):
        verdicts = ", ".join(f"{number} {verdict}" for verdict, number in hidden.items())
        _print_line(console, f"{hidden.total()} more are in {PAGE}: {verdicts}")
    best, metric = comparison.groups[0], comparison.metric
    if metric is not None and not metric.rank(best)[0] and not comparison.too_short[0]:
        others = f" and {len(best.runs) - 1} more" if len(best.runs) > 1 else ""
        console.print(
            f"best: {printable(str(best.runs[0].path))}{others}", soft_wrap=True, markup=False, highlight=False
        )


def _title(comparison: Comparison) -> str:
    runs = f"{len(comparison.runs)} runs"
    return f"{runs}, by {printable(comparison.metric.tag)}" if comparison.metric else runs


def markdown(
    comparison: Comparison, plot: str | None, pictures: Sequence[str] = (), maps: Mapping[int, str] | None = None
) -> str:
    """Return the report as Markdown, with links to the plot and to the pictures of the first runs, if there are any."""
    groups = comparison.groups
    names = [as_markdown(group.name) for group in groups]
    if len(groups) == 1:
        lines = [f"# Health of {names[0]}", "", *_health(comparison, range(1))]
    else:
        table = overview(comparison)
        aligned = ("---:" if place in table.right else "---" for place in range(len(table.titles)))
        lines = [
            f"# {as_markdown(_title(comparison))}",
            "",
            table_row(*map(as_markdown, table.titles)),
            table_row(*aligned),
        ]
        lines += [table_row(*map(_plain_cell, row)) for row in table.rows]
        lines += ["", "## Health"]
        for start in range(0, len(groups), SIDE_BY_SIDE):
            lines += ["", *_health(comparison, range(start, min(start + SIDE_BY_SIDE, len(groups))))]
    if plot:
        which = f", of the best {COLOURED}" if len(groups) > COLOURED else ""
        lines += ["", f"![Curves of the quantities above{which}]({plot})"]
    for column, (group, name) in enumerate(zip(groups, names, strict=True)):
        lines += ["", f"## {name}", "", *(f"{code(str(run.path))}  " for run in group.runs)]
        remarks = comparison.remarks(column)
        lines += ["", *(f"- {as_markdown(remark)}" for remark in remarks)] if remarks else []
        lines += ["", f"![{name} in one picture]({pictures[column]})"] if column < len(pictures) else []
        if (found := OrthogonalityMap.of_run(group.runs[0])) is not None:
            lines += ["", found.as_text()]
            lines += ["", f"![orthogonality of each operator]({maps[column]})"] if maps and column in maps else []
    return "\n".join(lines) + "\n"


def _health(comparison: Comparison, columns: range) -> list[str]:
    """Return the table of some groups' figures."""
    names = (as_markdown(comparison.groups[column].name) for column in columns)
    verdicts = (f"**{comparison.verdict(column)}**" for column in columns)
    return [
        table_row("quantity", "healthy", *names),
        table_row("---", "---", *["---:"] * len(columns)),
        *(
            table_row(as_markdown(line.label), line.healthy.words, *(str(figures[column] or "–") for column in columns))
            for line, figures in comparison.lines
        ),
        table_row("**verdict**", "ok", *verdicts),
    ]


def _label_width(comparison: Comparison, columns: range, width: int) -> int | None:
    """Return the width of the labels of a table for a terminal of so many characters; ``None`` if none is wide enough.

    Args:
        comparison: The groups.
        columns: Those in the table.
        width: Of the terminal.
    """
    label = max(cell_len(line.label) for line, _ in comparison.lines)
    healthy = max(cell_len(text) for text in ["healthy", *(line.healthy.words for line, _ in comparison.lines)])
    frame = 3  # of each column: a line, and a space on both sides; one more line is at the end
    left = width - healthy - sum(_width(comparison, column) + frame for column in columns) - 2 * frame - 1
    return None if left < min(label, LABEL_WIDTH) else min(label, left)


def _width(comparison: Comparison, column: int) -> int:
    """Return how many characters the column of a run needs."""
    figures = [_cell(figures[column]).cell_len for _, figures in comparison.lines]
    name = min(NAME_WIDTH, max(map(cell_len, comparison.groups[column].name.split(", "))))
    return max(name, cell_len(comparison.verdict(column)), *figures)


def _table(comparison: Comparison, columns: range, label_width: int) -> Table:
    table = Table(title="Health", title_justify="left")
    table.add_column("quantity", max_width=label_width, overflow="fold")
    table.add_column("healthy", overflow="fold")
    for column in columns:
        name = Text(comparison.groups[column].name.replace(", ", "\n"))
        table.add_column(name, justify="right", overflow="fold", max_width=_width(comparison, column))
    for line, figures in comparison.lines:
        cells = [_cell(figures[column]) for column in columns]
        table.add_row(Text(line.label), line.healthy.words, *cells)
    table.add_section()
    verdicts = map(comparison.verdict, columns)
    table.add_row("verdict", "ok", *(Text(verdict, COLOURS[verdict]) for verdict in verdicts))
    return table


def _map_table(found: OrthogonalityMap) -> Table:
    table = Table()
    table.add_column("operator", overflow="fold")
    for depth in found.depths:
        table.add_column(depth, justify="right", no_wrap=True)
    for operator in found.operators:
        cells = (found.cells.get((operator, depth)) for depth in found.depths)
        table.add_row(Text(printable(operator)), *("–" if cell is None else written(cell) for cell in cells))
    return table


def _cell(figure: Figure | None) -> Text:
    return Text("–") if figure is None else Text(str(figure), COLOURS[figure.verdict])


def _plain_cell(text: str) -> str:
    """Return a text for a cell; at its beginning a number is none of a list."""
    return text if _NUMBER.fullmatch(text) else as_markdown(text)
