"""The subcommands that need neither module nor data: ``report`` and ``consolidate``."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from lightning_muon.cli.output import debugging, exit_with, program_name

# With the line that --help shows for each.
OTHER_COMMANDS = {
    "report": "Show the health of one run, or of several side by side.",
    "consolidate": "Make one file of a sharded checkpoint, which is a folder.",
}


def run_report(arguments: Sequence[str]) -> None:
    """Print the health of runs, and write it as Markdown and plots; an error of the user ends the program."""
    # Only here: --help and the commands that train need none of this.
    from lightning_muon import report  # noqa: PLC0415

    parser = ArgumentParser(
        prog=f"{program_name()} report",
        description=f"{OTHER_COMMANDS['report']} Reads what TensorBoardLogger and CSVLogger wrote.",
        allow_abbrev=False,
    )
    log_dir_help = "a run's folder, or a folder with runs below, such as logs"
    output_help = "where report.md and curves.png go, by default report/ in the first log_dir"
    limit_help = "the most runs to show, those that were written to last (default: %(default)s)"
    parser.add_argument("log_dir", nargs="+", type=Path, help=log_dir_help)
    parser.add_argument("--output", type=Path, metavar="folder", help=output_help)
    parser.add_argument("--limit", type=_positive, default=5, metavar="n", help=limit_help)
    given = parser.parse_args(arguments)
    try:
        comparison = report.compare(given.log_dir, given.limit)
        report.print_comparison(comparison)
        written, no_plot = report.write_report(comparison, given.output or given.log_dir[0] / "report")
    except (report.RunLogError, report.ReportFileError) as error:
        if debugging():
            raise
        exit_with(str(error))
    print(f"written: {', '.join(map(str, written))}")
    if no_plot:
        print(no_plot)


def consolidate(arguments: Sequence[str]) -> None:
    """Make one file of a sharded checkpoint; an error of the user ends the program."""
    from lightning_muon.strategies import consolidate_checkpoint  # noqa: PLC0415 - it imports torch

    parser = ArgumentParser(
        prog=f"{program_name()} consolidate",
        description="Turn a sharded checkpoint, which is a folder, into one file that loads on any number of devices.",
    )
    parser.add_argument("folder", help="the sharded checkpoint, such as logs/version_0/checkpoints/last.ckpt")
    parser.add_argument("file", help="where to write; nothing is overwritten")
    given = parser.parse_args(arguments)
    try:
        consolidate_checkpoint(given.folder, given.file)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        if debugging():
            raise
        exit_with(str(error))
    print(f"checkpoint: {given.file}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
