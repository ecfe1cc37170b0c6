"""The command ``sweep``: the same training under many settings."""

from argparse import ArgumentTypeError
from collections.abc import Sequence

from lightning_muon.cli.option_parser import positive
from lightning_muon.cli.output import exit_with, program_name
from lightning_muon.cli.studies import preload, study_errors, study_parser, tensorboard_of
from lightning_muon.experiments.runs import Run
from lightning_muon.experiments.space import EXAMPLES, Dimension, parse
from lightning_muon.experiments.sweep import check_search, default_folder, print_trials, sweep, write_trials


def run_sweep(run: Run, arguments: Sequence[str]) -> None:
    """Run a sweep and print its table; an error of the user ends the program.

    Args:
        run: The command line of the program as a function of ``["fit", …]``.
        arguments: After ``sweep``.
    """
    words = "All other options are those of fit, for all runs."
    parser = study_parser("sweep", "--vary KEY=VALUES [--vary …]", words)
    vary_help = f"what to vary, and how: {EXAMPLES}; config=optimizer/moonlight,… varies presets"
    trials_help = "search n trials, each chosen by those before it (Optuna's TPE), instead of all combinations"
    prune_help = "end runs early that are worse than half of the others were at the same step (Optuna)"
    parser.add_argument("--vary", action="append", required=True, type=_dimension, metavar="KEY=VALUES", help=vary_help)
    parser.add_argument("--trials", type=positive, metavar="n", help=trials_help)
    parser.add_argument("--prune", action="store_true", help=prune_help)
    parser.add_argument("--maximize", action="store_true", help="look for the largest metric, not the smallest")
    given, of_fit = parser.parse_known_args(arguments)
    space: list[Dimension] = given.vary
    if twice := {one.key for one in space if sum(other.key == one.key for other in space) > 1}:
        exit_with(f"--vary {twice.pop()} is there twice; separate the values by commas")
    folder = given.study or default_folder(space)
    with study_errors("sweep", arguments):
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
    print_trials(records, given.metric, folder, program_name(), of_fit)
    print(tensorboard_of(folder))


def _dimension(text: str) -> Dimension:
    try:
        return parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("--vary ")) from error
