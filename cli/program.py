"""Choose the command: one for finished runs, ``routes``, many runs, or a run of the trainer."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_muon.cli.option_parser import OptionParser, positive
from lightning_muon.cli.output import OTHER_COMMANDS, debugging, exit_with, program_name
from lightning_muon.cli.signals import ending_quietly

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

    from lightning_muon.cli.muon_cli import MuonCLI


def main(
    model_class: "type[LightningModule] | Callable[..., LightningModule] | str | None" = None,
    datamodule_class: "type[LightningDataModule] | Callable[..., LightningDataModule] | str | None" = None,
    *,
    default_config: str | Path | Sequence[str | Path] | None = None,
    args: Sequence[str] | None = None,
) -> "MuonCLI":
    """Run the command line of a project; its ``__main__`` calls this.

    Beside the subcommands of :class:`MuonCLI` there are ``routes``, which shows what updates which parameter of the
    module, ``sweep``, which trains it under many settings, ``compare``, which compares optimizers, ``report``, which
    shows how healthy runs are, ``export``, which writes the weights of a checkpoint for use elsewhere, and
    ``consolidate``, which makes one file of a sharded checkpoint. The last three start without the module and its data,
    if these are given by their import paths.

    Example::

        main("my_project.module.TextModule", "my_project.data.TextData", default_config="configs/default.yaml")

    Args:
        model_class: The module to train, as a class or its import path; ``None`` to choose one by ``--model``.
        datamodule_class: Its data, likewise; ``None`` to choose it by ``--data``, or to have none.
        default_config: A YAML file with the defaults of all subcommands, below every ``--config``; or that and presets
            to lay over it, each of which a ``--config`` from its folder replaces.
        args: The command line, by default that of the program.

    Returns:
        The command line that ran, with its ``trainer``, ``model``, ``datamodule`` and ``config``.

    Raises:
        SystemExit: With code 0 after a command that is none of ``MuonCLI``; with code 2 after an error of the user,
            which is one line on stderr; with code 143 after SIGTERM and 130 after SIGINT.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    with ending_quietly():
        if arguments[:1] == ["sweep"]:
            from lightning_muon.cli.sweep import run_sweep  # noqa: PLC0415

            run_sweep(partial(_run, model_class, datamodule_class, default_config), arguments[1:])
            raise SystemExit(0)
        if arguments[:1] == ["report"]:
            run_report(arguments[1:])
            raise SystemExit(0)
        if arguments[:1] == ["export"]:
            run_export(arguments[1:])
            raise SystemExit(0)
        if arguments[:1] == ["consolidate"]:
            consolidate(arguments[1:])
            raise SystemExit(0)
        if arguments[:1] == ["compare"]:
            from lightning_muon.cli.compare import run_compare  # noqa: PLC0415
            from lightning_muon.cli.optimizer_settings import optimizer_settings  # noqa: PLC0415

            program = (model_class, datamodule_class, default_config)
            run_compare(partial(_run, *program), partial(optimizer_settings, *program), arguments[1:])
            raise SystemExit(0)
        if arguments[:1] == ["routes"]:
            from lightning_muon.cli.routes import RoutesCLI  # noqa: PLC0415

            RoutesCLI(model_class, datamodule_class, default_config=default_config, args=arguments[1:])
            raise SystemExit(0)
        from lightning_muon.cli.muon_cli import MuonCLI  # noqa: PLC0415 - it takes seconds to import

        return MuonCLI(model_class, datamodule_class, default_config=default_config, args=args)


def _run(
    model_class: Any, datamodule_class: Any, default_config: str | Path | Sequence[str | Path] | None, args: list[str]
) -> "MuonCLI":
    """Run the command line in the process of a trial."""
    return main(model_class, datamodule_class, default_config=default_config, args=args)


def run_report(arguments: Sequence[str]) -> None:
    """Print the health of runs, and write it as Markdown and plots; an error of the user ends the program."""
    # Only here: --help and the commands that train need none of this.
    from rich.console import Console  # noqa: PLC0415

    from lightning_muon import report  # noqa: PLC0415

    parser = OptionParser(
        prog=f"{program_name()} report",
        description=f"{OTHER_COMMANDS['report']} Reads what TensorBoardLogger and CSVLogger wrote.",
        allow_abbrev=False,
    )
    log_dir_help = "a run's folder, or a folder with runs below, such as logs or that of a sweep"
    output_help = "where report.md and curves.png go, by default report/ in the first log_dir"
    metric_help = "the tag to sort by, such as val/accuracy (default: the validation loss, or else another loss)"
    limit_help = "the most runs to read, those that were written to last (default: %(default)s)"
    parser.add_argument("log_dir", nargs="+", type=Path, help=log_dir_help)
    parser.add_argument("--output", type=Path, metavar="folder", help=output_help)
    parser.add_argument("--metric", metavar="tag", help=metric_help)
    parser.add_argument("--limit", type=positive, default=200, metavar="n", help=limit_help)
    parser.add_argument("--all", action="store_true", help="print every figure of each run, with its healthy range")
    check_help = "exit with 1 if a run is bad, for scripts and schedulers"
    parser.add_argument("--check", action="store_true", help=check_help)
    given = parser.parse_args(arguments)
    try:
        comparison = report.compare(given.log_dir, given.limit, given.metric)
        try:
            report.print_comparison(comparison, figures=given.all)
        finally:  # also when nobody reads on, as after `| head`
            written, no_plot = report.write_report(comparison, given.output or given.log_dir[0] / "report")
    except (report.RunLogError, report.ReportFileError) as error:
        if debugging():
            raise
        exit_with(str(error))
    for line in filter(None, [f"written: {', '.join(map(str, written))}", no_plot]):
        Console().print(line, soft_wrap=True, markup=False, highlight=False)
    if given.check and "bad" in comparison.verdicts():
        raise SystemExit(1)


def run_export(arguments: Sequence[str]) -> None:
    """Write the weights of a checkpoint; an error of the user ends the program."""
    from lightning_muon.cli import export  # noqa: PLC0415 - it imports torch

    parser = OptionParser(prog=f"{program_name()} export", description=OTHER_COMMANDS["export"], allow_abbrev=False)
    export.add_arguments(parser)
    given = parser.parse_args(arguments)
    try:
        line = export.export(given)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        if debugging():
            raise
        exit_with(str(error))
    print(line)


def consolidate(arguments: Sequence[str]) -> None:
    """Make one file of a sharded checkpoint; an error of the user ends the program."""
    from lightning_muon.strategies import consolidate_checkpoint  # noqa: PLC0415 - it imports torch

    parser = OptionParser(
        prog=f"{program_name()} consolidate",
        description="Turn a sharded checkpoint, which is a folder, into one file that loads on any number of devices.",
    )
    parser.add_argument("folder", help="the sharded checkpoint, such as logs/version_0/checkpoints/last.ckpt")
    parser.add_argument("file", help="where to write; nothing is overwritten")
    given = parser.parse_args(arguments)
    try:
        consolidate_checkpoint(given.folder, given.file)
    except (OSError, ValueError) as error:
        if debugging():
            raise
        exit_with(str(error))
    print(f"checkpoint: {given.file}")
