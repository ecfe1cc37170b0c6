"""What came of a run, read from its folder."""

import math
from pathlib import Path

from lightning_muon.experiments.runs import OUTPUT, WENT_BAD, last_line
from lightning_muon.experiments.trial import Result
from lightning_muon.report import Comparison, RunLog, RunLogError, read_run


def outcome(folder: Path, name: str, code: int, metric: str) -> Result:
    """Return the result of a run that has ended.

    Args:
        folder: Of the run.
        name: Of the trial.
        code: The exit code of its process.
        metric: The metric that judges it, such as ``val/loss``.
    """
    try:
        log = read_run(folder, name)
    except RunLogError as error:
        log = RunLog(name, folder, {}, None)
        if code == 0:
            return Result("failed", message=str(error))
    said = last_line(folder).removeprefix("error: ")
    if code < 0:
        said = f"ended by signal {-code}{', as when memory is out' if code == -9 else ''}; {said or 'no output'}"
    if code not in {0, WENT_BAD}:
        return Result("failed", steps=log.steps, message=f"{said or f'exit code {code}'} (see {folder / OUTPUT})")
    logged = log.scalars.get(metric, [])
    if code == 0 and not logged:
        return Result("failed", steps=log.steps, message=f"the run logged no {metric}{_why_none(log, metric)}")
    value = logged[-1][1] if logged else math.nan
    finals = {tag: values[-1][1] for tag, values in log.scalars.items() if values}
    figures = {tag: final for tag, final in finals.items() if math.isfinite(final) and is_summary(tag)}
    broken = [tag for tag, final in finals.items() if (tag == metric or "loss" in tag) and not math.isfinite(final)]
    verdict = Comparison.of([log]).verdict(0)
    diverged = code == WENT_BAD or bool(broken)
    return Result(
        "diverged" if diverged else "finished",
        None if diverged else value,
        log.steps,
        log.seconds_per_step,
        verdict,
        figures,
        said if code == WENT_BAD else f"not finite: {', '.join(broken)}" if broken else "",
    )


def _why_none(log: RunLog, metric: str) -> str:
    """Say what a run has logged instead of a metric, or that it has ended before a validation."""
    tags = [tag for tag in log.scalars if "loss" in tag or tag.startswith("val")]
    others = f"; it logged {', '.join(tags)}" if tags else ""
    if metric.startswith("val") and not any(tag.startswith("val") for tag in tags):
        others += (
            f"; in its {log.steps} steps there was no validation: train longer, or set trainer.val_check_interval or"
            " trainer.check_val_every_n_epoch"
        )
    return others


def curve_of(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Return the steps and values of a metric so far, without those that are not finite."""
    try:
        logged = read_run(folder, folder.name).scalars.get(metric, [])
    except RunLogError:
        return []
    return sorted({step: value for step, value in logged if math.isfinite(value)}.items())


def is_summary(tag: str) -> bool:
    """Return whether a tag is of the whole run, and not of one of its many layers."""
    return "." not in tag
