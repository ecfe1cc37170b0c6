"""The command ``compare``: the same training by several optimizers, after the same tuning of each."""

import contextlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lightning_muon.cli.option_parser import positive
from lightning_muon.cli.output import exit_with
from lightning_muon.cli.studies import preload, study_errors, study_parser, tensorboard_of
from lightning_muon.experiments.compare import compare, outcome
from lightning_muon.experiments.output import print_outcome, write_outcome
from lightning_muon.experiments.ratio import quantile
from lightning_muon.experiments.runs import Run, process_context
from lightning_muon.experiments.tuning import ALL_AXES

_FOLDER = Path("logs", "compare")
_WORDS = """\
Each optimizer is tuned by the same rules: the learning rate on a grid that extends itself while the best lies at its
end, then the learning rates of the other roles, together and one by one, then the weight decay; and again, until
nothing changes. Then it is trained with other seeds, to the end of a schedule, at the full length and at shorter ones.
All other options are those of fit."""


def run_compare(run: Run, settings_of: Callable[[Sequence[str]], Mapping[str, Any]], arguments: Sequence[str]) -> None:
    """Run a comparison, and show and write what came of it; an error of the user ends the program.

    Args:
        run: The command line of the program as a function of ``["fit", …]``.
        settings_of: :func:`~lightning_muon.cli.optimizer_settings.optimizer_settings` of a command line of ``fit``.
        arguments: After ``compare``.
    """
    added = "; with other --optimizers, it runs what is new"
    parser = study_parser("compare", "[--optimizers a,b,…]", _WORDS, added)
    optimizers_help = "presets of the group optimizer, or config files; the first is the baseline (%(default)s)"
    tune_help = "what is tuned: these, or single roles such as embedding instead of each_role (%(default)s)"
    seeds_help = "how many seeds the runs have that are compared (%(default)s)"
    parser.add_argument("--optimizers", default="adamw,moonlight", metavar="a,b,…", help=optimizers_help)
    parser.add_argument("--tune", default=",".join(ALL_AXES), metavar="a,b,…", help=tune_help)
    parser.add_argument("--seeds", type=positive, default=4, metavar="n", help=seeds_help)
    given, of_fit = parser.parse_known_args(arguments)
    folder = given.study or _FOLDER
    try:
        quantile()  # a missing package is told now, not after hours
    except ModuleNotFoundError as error:
        exit_with(str(error))
    with study_errors("compare", arguments):
        preload()
        protocol, records = compare(
            folder,
            given.optimizers.split(","),
            of_fit,
            run=run,
            inspect=partial(_in_a_process, settings_of),
            seeds=given.seeds,
            tuned=[axis for axis in given.tune.split(",") if axis],
            metric=given.metric,
            jobs=given.jobs,
        )
        found = outcome(protocol, records, given.metric)
        print_outcome(found)
        written, no_plots = write_outcome(found, folder)
    print(f"written:    {', '.join(map(str, written))}")
    if no_plots:
        print(no_plots)
    print(tensorboard_of(folder))


def _in_a_process(function: Callable[..., Mapping[str, Any]], arguments: Sequence[str]) -> Mapping[str, Any]:
    """Call a function in a process of its own: in this one, from which runs are forked, torch must not compute."""
    with ProcessPoolExecutor(1, process_context()) as pool:
        return pool.submit(_quietly, function, list(arguments)).result()


def _quietly(function: Callable[..., Mapping[str, Any]], arguments: Sequence[str]) -> Mapping[str, Any]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        return function(arguments)
