"""A sweep: a study over choices and ranges of the configuration, and the table of its trials."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_muon.experiments.journal import Record
from lightning_muon.experiments.locks import StudyError
from lightning_muon.experiments.runs import Run, command_of, first_refusal
from lightning_muon.experiments.search import Search, require_optuna
from lightning_muon.experiments.space import Choices, Dimension, Range, grid
from lightning_muon.experiments.study import print_result, run_study
from lightning_muon.experiments.trial import Result, Trial
from lightning_muon.report.plain_text import printable
from lightning_muon.report.replaced import replaced
from lightning_muon.report.settings import short_names

TRIALS = "trials.json"
_MOST_ROWS = 30


def default_folder(space: Sequence[Dimension]) -> Path:
    """Return the folder of a sweep that names none, such as ``logs/sweep/lr,weight_decay``."""
    return Path("logs", "sweep", ",".join(short_names([dimension.key for dimension in space])))


def sweep(
    folder: Path,
    space: Sequence[Dimension],
    run: Run,
    *,
    arguments: Sequence[str] = (),
    trials: int | None = None,
    prune: bool = False,
    jobs: int = 1,
    metric: str = "val/loss",
    maximize: bool = False,
) -> list[Record]:
    """Run all combinations of what varies, or as many trials as are asked for, each chosen by those before it.

    See :func:`~lightning_muon.experiments.run_study` for several workers, and for going on after a kill.

    Args:
        folder: Of the study.
        space: What varies.
        run: The command line as a function.
        arguments: Of ``fit``, for all runs.
        trials: How many to run, as Optuna suggests; ``None`` for all combinations.
        prune: End runs early that are worse than half of the others were at the same step. It needs Optuna.
        jobs: How many runs to have at a time.
        metric: What judges a run.
        maximize: Whether it is to be large.

    Returns:
        The trials, the best first.

    Raises:
        StudyError: If an option does not exist or a value does not fit, before the first run; if Optuna is needed and
            not there; and as ``run_study`` raises it.
        StudyStopped: After SIGTERM or SIGINT.
    """
    check_search(space, trials=trials, prune=prune)
    choices = [dimension for dimension in space if isinstance(dimension, Choices)]
    search = Search(space, trials or 0, maximize=maximize)
    if refused := first_refusal(run, [command_of(arguments, trial) for trial in _examples(space)]):
        raise StudyError(refused)
    all_trials = grid(choices) if trials is None else []
    records = run_study(
        folder,
        {"vary": [_described(dimension) for dimension in space], "maximize": maximize, "prune": prune}
        | {"search": trials is not None},
        (lambda _: all_trials) if trials is None else search,
        run,
        arguments=arguments,
        metric=metric,
        jobs=jobs,
        should_prune=search.should_prune if prune else None,
        on_result=print_result,
    )
    return best_first(records, maximize=maximize)


def check_search(space: Sequence[Dimension], *, trials: int | None, prune: bool) -> None:
    """Refuse a range whose values nobody chooses.

    Raises:
        StudyError: In that case, or if Optuna is needed and not installed.
    """
    if trials is None and (ranges := [dimension.key for dimension in space if isinstance(dimension, Range)]):
        raise StudyError(
            f"--vary {ranges[0]}: a range has no end of values: add --trials n to search it, or a number of points, as"
            " in 1e-4..1e-1/5"
        )
    if trials is not None or prune:
        require_optuna()


def best_first(records: Sequence[Record], *, maximize: bool) -> list[Record]:
    """Return records sorted by the metric; those without a value at the end."""

    def place(record: Record) -> tuple[int, float]:
        result = record.result or Result("failed")
        kinds = ("finished", "pruned", "diverged", "failed")
        value = result.value if result.value is not None else 0.0
        return kinds.index(result.status), -value if maximize else value

    return sorted(records, key=place)


def print_trials(records: Sequence[Record], metric: str, folder: Path, command: str, arguments: Sequence[str]) -> None:
    """Print the table of the trials, the best first, and the command that repeats the best one.

    Args:
        records: The best first.
        metric: Its name.
        folder: Of the study.
        command: What starts the program, such as ``python -m my_project``.
        arguments: Of ``fit``, for all runs.
    """
    console = Console()
    table = Table(title=f"{len(records)} trials", title_justify="left")
    table.add_column("trial", overflow="fold")
    table.add_column(metric, justify="right")
    for name in ("steps", "s/step"):
        table.add_column(name, justify="right")
    table.add_column("health")
    for record in records[:_MOST_ROWS]:
        result = record.result or Result("failed")
        value = "–" if result.value is None else f"{result.value:.4g}"
        seconds = "–" if result.seconds_per_step is None else f"{result.seconds_per_step:.3g}"
        health = result.verdict if result.status == "finished" else result.status
        table.add_row(Text(record.trial.name), value, str(result.steps), seconds, health)
    console.print(table)

    def say(line: str) -> None:
        console.print(printable(line), soft_wrap=True, markup=False, highlight=False)

    if len(records) > _MOST_ROWS:
        say(f"the best {_MOST_ROWS} are shown; all are in {folder / TRIALS}")
    failed = [record for record in records if record.result and record.result.status == "failed"]
    if failed:
        say(f"failed:     {len(failed)}, such as {failed[0].trial.name}: {failed[0].result.message}")  # type: ignore[union-attr]
        say("            the same command runs them again")
    best = records[0] if records else None
    if best and best.result and best.result.status == "finished":
        say(f"best:       {command} {shlex.join(command_of(arguments, best.trial))}")


def write_trials(records: Sequence[Record], folder: Path) -> None:
    """Write all trials with their results to ``trials.json``, whole or not at all."""
    rows = [
        {
            "name": record.trial.name,
            "options": dict(record.trial.options),
            **(asdict(record.result) if record.result else {}),
        }
        for record in records
    ]
    with replaced(folder / TRIALS) as unfinished:
        unfinished.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _described(dimension: Dimension) -> str:
    if isinstance(dimension, Choices):
        return f"{dimension.key}={','.join(json.dumps(value) for value in dimension.values)}"
    return f"{dimension.key}={'log:' if dimension.log else ''}{dimension.low}..{dimension.high}"


def _examples(space: Sequence[Dimension]) -> list[Trial]:
    """Return trials in which each value of each key is once, of a range its ends."""
    values = {one.key: one.values if isinstance(one, Choices) else (one.low, one.high) for one in space}
    first = {key: values_of_key[0] for key, values_of_key in values.items()}
    others = [first | {key: value} for key, values_of_key in values.items() for value in values_of_key[1:]]
    return [Trial("example", options) for options in [first, *others]]
