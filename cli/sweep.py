"""The command ``sweep``: the same training under many settings."""

import os
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from lightning_muon.cli.option_parser import OptionParser, positive
from lightning_muon.cli.output import OTHER_COMMANDS, debugging, exit_with, program_name, python, quoted
from lightning_muon.experiments import StudyError, StudyStopped
from lightning_muon.experiments.runs import RUNS, Run
from lightning_muon.experiments.space import EXAMPLES, Dimension, parse
from lightning_muon.experiments.sweep import check_search, default_folder, print_trials, sweep, write_trials

_EPILOG = """All other options are those of fit, for all runs.

Several workers, on other GPUs, machines or tasks of a SLURM array: start the same command with the same --study.
After a kill, the same command goes on."""


def run_sweep(run: Run, arguments: Sequence[str]) -> None:
    """Run a sweep and print its table; an error of the user ends the program.

    Args:
        run: The command line of the program as a function of ``["fit", …]``.
        arguments: After ``sweep``.
    """
    parser = OptionParser(
        prog=f"{program_name()} sweep",
        usage=f"{program_name()} sweep --vary KEY=VALUES [--vary …] [options of sweep] [options of fit]",
        description=OTHER_COMMANDS["sweep"],
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    vary_help = f"what to vary, and how: {EXAMPLES}; config=optimizer/moonlight,… varies presets"
    trials_help = "search n trials, each chosen by those before it (Optuna's TPE), instead of all combinations"
    prune_help = "end runs early that are worse than half of the others were at the same step (Optuna)"
    parser.add_argument("--vary", action="append", required=True, type=_dimension, metavar="KEY=VALUES", help=vary_help)
    parser.add_argument("--trials", type=positive, metavar="n", help=trials_help)
    parser.add_argument("--prune", action="store_true", help=prune_help)
    parser.add_argument("--maximize", action="store_true", help="look for the largest metric, not the smallest")
    add_study_options(parser)
    given, of_fit = parser.parse_known_args(arguments)
    space: list[Dimension] = given.vary
    if twice := {one.key for one in space if sum(other.key == one.key for other in space) > 1}:
        exit_with(f"--vary {twice.pop()} is there twice; separate the values by commas")
    folder = given.study or default_folder(space)
    try:
        check_search(space, trials=given.trials, prune=given.prune)
        print(f"study:      {folder}", flush=True)
        preload()
        records = sweep(
            folder,
            space,
            run,
            arguments=of_fit,
            trials=given.trials,
            prune=given.prune,
            jobs=given.jobs,
            metric=given.metric,
            maximize=given.maximize,
        )
        write_trials(records, folder)
    except (OSError, StudyError) as error:
        if debugging():
            raise
        exit_with(str(error))
    except StudyStopped:
        sys.stderr.write(f"go on:      {program_name()} {shlex.join(['sweep', *arguments])}\n")
        raise
    print_trials(records, given.metric, folder, program_name(), of_fit)
    print(f"look:       {python()} -m tensorboard.main --logdir {quoted(str(folder / RUNS))}")


def add_study_options(parser: ArgumentParser) -> None:
    """Add the options of all commands that have many runs."""
    study_help = "the folder of the study: its journal, its runs, its results"
    jobs_help = "runs at a time, which share the cores and the GPUs (default: %(default)s)"
    metric_help = "what judges a run, as it logs it (default: %(default)s)"
    parser.add_argument("--study", type=Path, metavar="folder", help=study_help)
    parser.add_argument("--jobs", type=positive, default=1, metavar="n", help=jobs_help)
    parser.add_argument("--metric", default="val/loss", metavar="name", help=metric_help)


def preload() -> None:
    """Import what each run needs, once: they are forked from this process."""
    if sys.platform != "linux":
        return
    # Otherwise the question whether there is a GPU would start CUDA here, which a fork cannot use.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch.utils.tensorboard  # noqa: F401, PLC0415

    import lightning_muon.cli.muon_cli  # noqa: PLC0415
    import lightning_muon.strategies  # noqa: F401, PLC0415


def _dimension(text: str) -> Dimension:
    try:
        return parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("--vary ")) from error
