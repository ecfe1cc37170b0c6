"""``report <log folder> …``: the health of one run, or of several side by side, for people without a browser."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from lightning_muon.cli.comparison import Comparison
from lightning_muon.cli.output import OTHER_COMMANDS, debugging, exit_with, program_name
from lightning_muon.cli.report_files import ReportFileError, write_report
from lightning_muon.cli.report_tables import tables
from lightning_muon.cli.run_log import RunLog, RunLogError, find_runs, read_run, run_names

SIDE_BY_SIDE = 5


def run_report(arguments: Sequence[str]) -> None:
    """Print the health of runs, and write it as Markdown and plots; an error of the user ends the program."""
    given = _parser().parse_args(arguments)
    try:
        comparison = compare(given.log_dir, given.limit)
        print_comparison(comparison)
        output = given.output or given.log_dir[0] / "report"
        written, no_plot = write_report(comparison, output)
    except (RunLogError, ReportFileError) as error:
        if debugging():
            raise
        exit_with(str(error))
    _say(f"written: {', '.join(map(str, written))}")
    if no_plot:
        _say(no_plot)


def compare(folders: Sequence[str | Path], limit: int) -> Comparison:
    """Read the runs in and below folders, and measure them.

    Args:
        folders: Each a run, or a folder with runs below.
        limit: The most runs to take; the ones that were written to last.

    Raises:
        RunLogError: If a folder has no run, or a file of one cannot be read. Where others can, it is left out, with a
            line on stderr.
    """
    found = find_runs(folders)
    runs: list[RunLog] = []
    empty: list[RunLog] = []
    for path in found:
        if len(runs) == limit:
            _say(f"the {limit} latest of {len(found)} runs are shown; --limit {len(found)} shows all", sys.stderr)
            break
        try:
            run = read_run(path, str(path))
        except RunLogError as error:
            if len(found) == 1:
                raise
            _say(f"left out: {error}", sys.stderr)
        else:
            (runs if run.scalars else empty).append(run)
    if not runs:
        raise RunLogError(f"no run in {', '.join(repr(str(folder)) for folder in folders)} has logged a value yet")
    if empty:
        _say(f"left out, since nothing was logged there: {', '.join(run.name for run in empty)}", sys.stderr)
    runs.sort(key=lambda run: _naturally(run.path))
    names = run_names([run.path for run in runs])
    return Comparison.of(replace(run, name=name) for run, name in zip(runs, names, strict=True))


def print_comparison(comparison: Comparison) -> None:
    """Print the runs as tables, as many beside each other as the terminal is wide for, and what there is to say."""
    console = Console()
    for table in tables(comparison, console.width):
        console.print(table)
    for column, run in enumerate(comparison.runs):
        remarks = comparison.remarks(column)
        if remarks:
            console.print(Text(run.name, "bold"))
        for remark in remarks:
            console.print(f"- {remark}", markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program_name()} report",
        description=f"{OTHER_COMMANDS['report']} Reads what TensorBoardLogger and CSVLogger wrote.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "log_dir", nargs="+", type=Path, help="a run's folder, or a folder with runs below, such as logs"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="folder",
        help="where report.md and curves.png go, by default report/ in the first log_dir",
    )
    parser.add_argument(
        "--limit",
        type=_positive,
        default=SIDE_BY_SIDE,
        metavar="n",
        help="the most runs to show, those that were written to last (default: %(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _naturally(path: Path) -> list[tuple[int, str]]:
    """Sort ``version_2`` before ``version_10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _say(line: str, where: TextIO | None = None) -> None:
    (where or sys.stdout).write(f"{line}\n")
