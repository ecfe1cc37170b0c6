"""A report as files: Markdown, and plots where matplotlib is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_muon.cli.comparison import Comparison
from lightning_muon.cli.curves import draw_curves
from lightning_muon.cli.quantity import Figure

PAGE, PLOT = "report.md", "curves.png"


class ReportFileError(ValueError):
    """A report that cannot be written; the message is one line for the user."""


def write_report(comparison: Comparison, folder: Path) -> tuple[list[Path], str | None]:
    """Write ``report.md`` and ``curves.png``.

    Each file is there whole or not at all; an older one stays until its successor is complete.

    Args:
        comparison: The runs.
        folder: Is made where it does not exist.

    Returns:
        What was written; and why there is no plot, if there is none.

    Raises:
        ReportFileError: If the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _whole(folder / PLOT) as unfinished:
            no_plot = draw_curves(comparison.runs, unfinished)
        with _whole(folder / PAGE) as unfinished:
            unfinished.write_text(markdown(comparison, None if no_plot else PLOT), encoding="utf-8")
    except OSError as error:
        raise ReportFileError(
            f"cannot write the report to '{folder}': {error.strerror}; --output names another folder"
        ) from error
    return [folder / PAGE] if no_plot else [folder / PAGE, folder / PLOT], no_plot


def markdown(comparison: Comparison, plot: str | None) -> str:
    """Return the report as Markdown.

    Args:
        comparison: The runs.
        plot: Where the plots are, relative to the page.
    """
    names = [_escaped(run.name) for run in comparison.runs]
    lines = [
        f"# Health of {', '.join(names)}",
        "",
        _row("quantity", "healthy", *names),
        _row("---", "---", *["---:"] * len(names)),
        *(_row(_escaped(line.label), line.healthy.words, *map(_cell, figures)) for line, figures in comparison.lines),
        _row("**verdict**", "ok", *(f"**{verdict}**" for verdict in comparison.verdicts())),
    ]
    if plot:
        lines += ["", f"![Curves of the quantities above]({plot})"]
    for column, (run, name) in enumerate(zip(comparison.runs, names, strict=True)):
        lines += ["", f"## {name}", "", f"`{run.path}`"]
        remarks = comparison.remarks(column)
        lines += ["", *(f"- {_escaped(remark)}" for remark in remarks)] if remarks else []
    return "\n".join(lines) + "\n"


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, and put what was written in its place at the end, if anything was."""
    unfinished = path.with_name(f".{path.stem}-unfinished{path.suffix}")  # matplotlib goes by the ending
    try:
        yield unfinished
        if unfinished.exists():
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _cell(figure: Figure | None) -> str:
    return "–" if figure is None else str(figure)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    for letter in "\\|*_<`[":
        text = text.replace(letter, f"\\{letter}")
    return text
