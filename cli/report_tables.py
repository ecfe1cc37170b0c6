"""A comparison as tables for a terminal."""

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from lightning_muon.cli.comparison import Comparison
from lightning_muon.cli.quantity import Figure

COLOURS = {"ok": "green", "watch": "yellow", "bad": "red", "not measured": "yellow", None: ""}
# In characters: what labels are broken to where not all runs would fit beside them, and the names of runs.
LABEL_WIDTH, NAME_WIDTH = 30, 16


def tables(comparison: Comparison, width: int) -> list[Table]:
    """Return the runs as tables, one below the other, each of as many runs as fit beside all labels.

    Args:
        comparison: The runs.
        width: Of the terminal, in characters. What is too wide is broken, nothing is cut.
    """
    blocks, label_width = _blocks(comparison, width)
    return [_table(comparison, block, label_width) for block in blocks]


def _blocks(comparison: Comparison, width: int) -> tuple[list[range], int]:
    """Return which runs are in each table, and how wide its labels may be."""
    label = max(cell_len(line.label) for line, _ in comparison.lines)
    healthy = max(cell_len(text) for text in ["healthy", *(line.healthy.words for line, _ in comparison.lines)])
    runs = [_width(comparison, column) for column in range(len(comparison.runs))]
    frame = 3  # of each column: a line, and a space on both sides; one more line is at the end
    if label + healthy + sum(runs) + frame * (2 + len(runs)) + 1 > width:
        label = min(label, LABEL_WIDTH)
    blocks, start = [], 0
    while start < len(runs):
        end, used = start + 1, label + healthy + runs[start] + 3 * frame + 1
        while end < len(runs) and used + runs[end] + frame <= width:
            used, end = used + runs[end] + frame, end + 1
        blocks.append(range(start, end))
        start = end
    return blocks, label


def _width(comparison: Comparison, column: int) -> int:
    """Return how many characters the column of a run needs."""
    figures = [_cell(figures[column]).cell_len for _, figures in comparison.lines]
    name = min(cell_len(comparison.runs[column].name), NAME_WIDTH)
    return max(name, cell_len(comparison.verdict(column)), *figures)


def _table(comparison: Comparison, columns: range, label_width: int) -> Table:
    which = f"runs {columns.start + 1} to {columns.stop}" if len(columns) > 1 else f"run {columns.stop}"
    part = f", {which} of {len(comparison.runs)}" if len(columns) < len(comparison.runs) else ""
    table = Table(title=f"Health{part}", title_justify="left")
    table.add_column("quantity", max_width=label_width, overflow="fold")
    table.add_column("healthy", overflow="fold")
    for column in columns:
        name = Text(comparison.runs[column].name)
        table.add_column(name, justify="right", overflow="fold", max_width=_width(comparison, column))
    for line, figures in comparison.lines:
        cells = [_cell(figures[column]) for column in columns]
        table.add_row(Text(line.label), line.healthy.words, *cells)
    table.add_section()
    verdicts = map(comparison.verdict, columns)
    table.add_row("verdict", "ok", *(Text(verdict, COLOURS[verdict]) for verdict in verdicts))
    return table


def _cell(figure: Figure | None) -> Text:
    return Text("–") if figure is None else Text(str(figure), COLOURS[figure.verdict])
