"""A comparison of runs as tables for a terminal, and as files: Markdown, and curves where matplotlib is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_muon.report.comparison import Comparison
from lightning_muon.report.curves import draw_curves
from lightning_muon.report.health import Figure
from lightning_muon.report.plain_text import code, printable
from lightning_muon.report.plain_text import markdown as as_markdown

PAGE, PLOT = "report.md", "curves.png"
COLOURS = {"ok": "green", "costly": "yellow", "watch": "yellow", "bad": "red", "not measured": "yellow", None: ""}
# The most characters for the names of runs, and for labels where not all runs fit beside them; longer ones are wrapped.
NAME_WIDTH, LABEL_WIDTH = 16, 30


class ReportFileError(ValueError):
    """The report cannot be written; the message is one line for the user."""


def print_comparison(comparison: Comparison) -> None:
    """Print the runs as tables, each with as many runs as the terminal is wide for, and the remarks on each run."""
    console = Console()
    blocks, label_width = _blocks(comparison, console.width)
    for block in blocks:
        console.print(_table(comparison, block, label_width))
    for column, run in enumerate(comparison.runs):
        remarks = comparison.remarks(column)
        if remarks:
            console.print(Text(run.name, "bold"))
        for remark in remarks:
            console.print(f"- {printable(remark)}", markup=False, highlight=False)


def write_report(comparison: Comparison, folder: Path) -> tuple[list[Path], str | None]:
    """Write ``report.md`` and ``curves.png``.

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
            no_plot = draw_curves(comparison.runs, unfinished)
        with replaced(folder / PAGE) as unfinished:
            unfinished.write_text(markdown(comparison, None if no_plot else PLOT), encoding="utf-8")
    except OSError as error:
        raise ReportFileError(
            f"cannot write the report to '{folder}': {error.strerror}; --output names another folder"
        ) from error
    return [folder / PAGE] if no_plot else [folder / PAGE, folder / PLOT], no_plot


def markdown(comparison: Comparison, plot: str | None) -> str:
    """Return the report as Markdown, with a link to the plot if there is one."""
    names = [as_markdown(run.name) for run in comparison.runs]
    lines = [
        f"# Health of {', '.join(names)}",
        "",
        _row("quantity", "healthy", *names),
        _row("---", "---", *["---:"] * len(names)),
        *(
            _row(as_markdown(line.label), line.healthy.words, *(str(figure or "–") for figure in figures))
            for line, figures in comparison.lines
        ),
        _row("**verdict**", "ok", *(f"**{verdict}**" for verdict in comparison.verdicts())),
    ]
    if plot:
        lines += ["", f"![Curves of the quantities above]({plot})"]
    for column, (run, name) in enumerate(zip(comparison.runs, names, strict=True)):
        lines += ["", f"## {name}", "", f"{code(str(run.path))}"]
        remarks = comparison.remarks(column)
        lines += ["", *(f"- {as_markdown(remark)}" for remark in remarks)] if remarks else []
    return "\n".join(lines) + "\n"


def _blocks(comparison: Comparison, width: int) -> tuple[list[range], int]:
    """Return which runs are in each table, and the width of the labels, for a terminal of so many characters."""
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


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces the given one at the end if it was written."""
    # Several processes may write it, each a file of its own; matplotlib needs the suffix.
    unfinished = path.with_name(f".{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        yield unfinished
        if unfinished.exists():
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
