"""The command ``compare``: the same training by several optimizers, after the same tuning of each."""

import contextlib
import io
import logging
import multiprocessing
import platform
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lightning_muon.experiments.compare import compare, outcome
from lightning_muon.experiments.tuning import ALL_AXES


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's own arguments; all others are those of ``fit``."""

    def add(name: str, default: object, metavar: str, words: str, **options: Any) -> None:
        parser.add_argument(name, default=default, metavar=metavar, help=f"{words} (default: %(default)s)", **options)

    optimizers = "presets of the group optimizer, or config files; the first is the baseline"
    add("--optimizers", "adamw,moonlight", "a,b,…", optimizers)
    add("--study", Path("compare"), "folder", "for the runs and the result; there the same command goes on", type=Path)
    add("--seeds", 4, "n", "how many seeds the final runs have", type=int)
    tune = "what is tuned, in this order: lr, weight_decay, roles (the learning rate of each role), or single roles"
    add("--tune", ",".join(ALL_AXES), "a,b,…", tune)
    add("--metric", "val/loss", "tag", "what is compared, as it is logged; lower is better")
    add("--jobs", 1, "n", "how many runs to have at a time; they share the cores and the GPUs", type=int)


def run_compare(
    given: Namespace, arguments: Sequence[str], run: Callable[[list[str]], object], inspect: Callable[..., Any]
) -> None:
    """Run the comparison, and show what came of it.

    Args:
        given: The command's own arguments.
        arguments: Those of ``fit``.
        run: The command line as a function.
        inspect: :func:`~lightning_muon.cli.optimizer_settings.optimizer_settings` of the program.
    """
    protocol, records = compare(
        given.study,
        given.optimizers.split(","),
        arguments,
        run=run,
        inspect=partial(_in_a_process, inspect),
        seeds=given.seeds,
        tuned=[axis for axis in given.tune.split(",") if axis],
        metric=given.metric,
        jobs=given.jobs,
    )
    print(outcome(protocol, records, given.metric, _device()).to_json()[:3000])


def _in_a_process(inspect: Callable[..., Any], arguments: Sequence[str]) -> Mapping[str, Any]:
    """Call a function in a process of its own: in this one, from which runs are forked, torch must not compute."""
    method = "fork" if sys.platform == "linux" else "spawn"
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        found: Mapping[str, Any] = pool.submit(_quietly, inspect, list(arguments)).result()
    return found


def _quietly(inspect: Callable[..., Any], arguments: Sequence[str]) -> Mapping[str, Any]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        found: Mapping[str, Any] = inspect(arguments)
    return found


def _device() -> str:
    return platform.processor() or platform.machine()
