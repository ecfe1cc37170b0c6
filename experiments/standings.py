"""How the finalists of a comparison stand: losses, ratios to the baseline, divergence, cost; and the first sentence."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_muon.experiments.outcome import Finalist, FinalRun, Outcome
from lightning_muon.experiments.ratio import Array, Interval, mean_interval, seconds_ratio, steps_ratio

NO_DIFFERENCE = "no difference found"
OPTIMIZER_SHARE = "optimizer_share"
_VERDICTS = ("bad", "watch", "not measured", "ok")  # the worst first


@dataclass(frozen=True)
class Standing:
    """A line of the table.

    Attributes:
        name: Of the optimizer.
        settings: That its tuning found.
        tuning_runs: How many runs the tuning took.
        loss: The mean over seeds at the longest horizon; ``None`` if it diverged there, or did not run.
        difference: The mean difference of that loss to the baseline's, of runs with the same seed.
        steps: The ratio of steps, and so of tokens, to the baseline's final loss; ``None`` if there is none.
        seconds: The ratio of seconds.
        runs: How many final runs there are.
        diverged: How many of them diverged.
        optimizer_share: Time of the optimizer's step over that of the whole step, between 0 and 1.
        state_bytes: Of the optimizer's state.
        verdict: The worst of the monitors' verdicts on the final runs.
        notes: What a reader must know of these figures.
    """

    name: str
    settings: Mapping[str, float]
    tuning_runs: int
    loss: Interval | None = None
    difference: Interval | None = None
    steps: Interval | None = None
    seconds: Interval | None = None
    runs: int = 0
    diverged: int = 0
    optimizer_share: float | None = None
    state_bytes: int | None = None
    verdict: str = "not measured"
    notes: tuple[str, ...] = ()


def standings(outcome: Outcome) -> list[Standing]:
    """Return the finalists by their final loss, the best first; those without one are at the end."""
    found = [_standing(finalist, outcome) for finalist in outcome]
    return sorted(found, key=lambda one: (one.loss is None, one.loss.value if one.loss else 0))


def ratio_text(ratio: Interval | None) -> str:
    """Return a ratio with its interval, and whether a difference was found at all."""
    if ratio is None:
        return "–"
    return f"{ratio.text()}: {NO_DIFFERENCE}" if ratio.contains(1) else ratio.text()


def sentence(outcome: Outcome, name: str | None = None) -> str:
    """Return what a comparison found, in the words of a README's first line.

    Args:
        outcome: The comparison.
        name: The optimizer it is about; by default the best that is not the baseline.
    """
    found = standings(outcome)
    others = [one for one in found if one.name != outcome.baseline]
    chosen = next((one for one in others if name in (None, one.name)), None)
    if chosen is None:
        return "There is nothing to compare the baseline with."
    return f"{_finding(chosen, outcome)} {_circumstances(outcome)}"


def _standing(finalist: Finalist, outcome: Outcome) -> Standing:
    final = finalist.at(outcome.horizon)
    shares = [run.result.figures[OPTIMIZER_SHARE] for run in finalist.runs if OPTIMIZER_SHARE in run.result.figures]
    loss, difference, steps, seconds = None, None, None, None
    notes = _notes_on(finalist)
    finished = {seed: run.loss for seed, run in final.items() if run.finished}
    if finished and not any(run.diverged for run in final.values()):
        loss = mean_interval(list(finished.values()))
    if finalist.name != outcome.baseline:
        difference, steps, seconds, why = _compared(finalist, outcome[outcome.baseline], outcome)
        notes += why
    return Standing(
        name=finalist.name,
        settings=finalist.settings,
        tuning_runs=len(finalist.tuning),
        loss=loss,
        difference=difference,
        steps=steps,
        seconds=seconds,
        runs=len(finalist.runs),
        diverged=sum(run.diverged for run in finalist.runs),
        optimizer_share=statistics.median(shares) if shares else None,
        state_bytes=finalist.state_bytes,
        verdict=next((word for word in _VERDICTS if any(run.result.verdict == word for run in finalist.runs)), "–"),
        notes=tuple(notes),
    )


def _notes_on(finalist: Finalist) -> list[str]:
    """Return what is to be said of an optimizer, whatever the baseline."""
    notes = []
    for horizon in sorted({run.horizon for run in finalist.runs}):
        runs = finalist.at(horizon).values()
        if diverged := sum(run.diverged for run in runs):
            notes.append(f"{diverged} of {len(runs)} runs of {horizon} steps diverged")
        failed = [run for run in runs if not run.diverged and not run.finished]
        if failed:
            message = failed[0].result.message or f"status: {failed[0].result.status}"
            notes.append(f"{len(failed)} of {len(runs)} runs of {horizon} steps have no loss ({message})")
    if unstable := sum(run.status == "diverged" for run in finalist.tuning):
        notes.append(f"{unstable} of {len(finalist.tuning)} tuning runs diverged")
    if finalist.at_edge:
        names = ", ".join(finalist.at_edge)
        notes.append(f"the best {names} is at the end of what was tried: a better value may lie beyond")
    return notes


def _compared(
    finalist: Finalist, baseline: Finalist, outcome: Outcome
) -> tuple[Interval | None, Interval | None, Interval | None, list[str]]:
    """Return difference, ratio of steps and ratio of seconds to the baseline, and why one of them is missing."""
    if diverged := [one.name for one in (finalist, baseline) if any(run.diverged for run in one.runs)]:
        return None, None, None, [f"not compared, because {' and '.join(diverged)} diverged"]
    horizons = [horizon for horizon in outcome.horizons if finalist.at(horizon) and baseline.at(horizon)]
    if not horizons or horizons[-1] != outcome.horizon:
        return None, None, None, [f"not compared: no runs of {outcome.horizon} steps"]
    runs = [_finished(one, horizons) for one in (finalist, baseline)]
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if not seeds:
        return None, None, None, ["not compared: no seed of which all runs have a loss"]
    notes = []
    if len(seeds) < len(outcome.seeds):
        notes.append(f"compared by {len(seeds)} of {len(outcome.seeds)} seeds, of which all runs have a loss")
    if len(seeds) == 1:
        notes.append("one seed gives no interval")
    losses = [np.array([[run.loss for run in of[seed]] for seed in seeds]).T for of in runs]
    difference = mean_interval(losses[0][-1] - losses[1][-1])
    if len(horizons) < 2:
        return difference, None, None, [*notes, "one horizon gives no ratio of steps"]
    steps = steps_ratio(losses[0], losses[1], horizons)
    times = [_seconds([of[seed] for seed in seeds]) for of in runs]
    seconds = None if times[0] is None or times[1] is None else seconds_ratio(steps, times[0], times[1])
    return difference, steps, seconds, notes


def _finished(finalist: Finalist, horizons: Sequence[int]) -> dict[int, list[FinalRun]]:
    """Return the runs of each seed in the order of the horizons, for seeds of which all have a loss."""
    by_horizon = [finalist.at(horizon) for horizon in horizons]
    complete = {seed: [runs[seed] for runs in by_horizon if seed in runs] for seed in by_horizon[-1]}
    return {
        seed: runs
        for seed, runs in complete.items()
        if len(runs) == len(horizons) and all(run.finished for run in runs)
    }


def _seconds(runs: Sequence[Sequence[FinalRun]]) -> Array | None:
    """Return the seconds per step for each seed, the geometric mean over horizons; ``None`` if one is not known."""
    times = [[run.result.seconds_per_step for run in of_seed] for of_seed in runs]
    if not all(time for of_seed in times for time in of_seed):
        return None
    return np.asarray(np.exp(np.log(np.array(times, float)).mean(1)))


def _finding(chosen: Standing, outcome: Outcome) -> str:
    name, baseline = chosen.name, outcome.baseline
    if chosen.diverged:
        return f"{name} diverged in {chosen.diverged} of {chosen.runs} runs."
    if chosen.steps is None:
        return f"{name} was not compared with {baseline}: {'; '.join(chosen.notes)}."
    if chosen.steps.contains(1):
        return f"Between {name} and {baseline} no difference was found ({_in_words(chosen.steps, 'the steps')})."
    seconds = ""
    if chosen.seconds is not None:
        time = "no difference in time was found" if chosen.seconds.contains(1) else None
        seconds = f", and {_in_words(chosen.seconds, 'the seconds')}" + (f" ({time})" if time else "")
    return f"{name} needs {_in_words(chosen.steps, 'the steps')} of {baseline} for the same loss{seconds}."


def _in_words(ratio: Interval, of: str) -> str:
    if ratio.low is None or ratio.high is None:
        bound = Interval(None, ratio.low, ratio.high).text()
        return f"{bound} times {of}"
    value = "" if ratio.value is None else f"{ratio.value:.2f} times {of}, "
    return f"{value}95 % interval {ratio.low:.2f} to {ratio.high:.2f}"


def _circumstances(outcome: Outcome) -> str:
    """Return how it was measured."""
    setting = outcome.setting
    size = "" if setting.parameters is None else f" with {_large(setting.parameters)} parameters"
    read = "" if setting.tokens_per_step is None else f" of {_large(setting.tokens_per_step)} {setting.unit}"
    device = f" on {setting.device}" if setting.device else ""
    horizons = outcome.horizons
    schedules = f" schedules of {_joined(horizons)} steps{read}," if horizons else ""
    tuned = sorted(len(finalist.tuning) for finalist in outcome)
    tuning = f"{tuned[0]}" if tuned[0] == tuned[-1] else f"{tuned[0]} to {tuned[-1]}"
    seeds = f"{len(outcome.seeds)} seed{'s' if len(outcome.seeds) != 1 else ''}"
    return (
        f"Measured with {setting.task or 'one model'}{size}{device}: full{schedules} {seeds}, each optimizer tuned in"
        f" {tuning} runs. Small models do not speak for large ones."
    )


def _joined(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _large(number: int) -> str:
    """Return a number in thousands, millions or billions."""
    for size, word in ((1e9, " billion"), (1e6, " million"), (1e4, " thousand")):
        if number >= size:
            return f"{number / (1e3 if word == ' thousand' else size):.3g}{word}"
    return str(number)
