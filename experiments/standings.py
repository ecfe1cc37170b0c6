"""How the finalists of a comparison stand: losses, ratios to the baseline, divergence, cost; and the first sentence."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_muon.experiments.outcome import Finalist, FinalRun, Outcome
from lightning_muon.experiments.ratio import Array, Interval, mean_interval, seconds_ratio, steps_ratio

NO_DIFFERENCE = "no difference found"
OPTIMIZER_SHARE = "optimizer_share"
_VERDICTS = ("bad", "watch", "not measured", "ok", "too short to judge")  # the worst first; a short run has none


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
    if name is not None:
        others = [one for one in others if one.name == name]
    if not others:
        return f"There is nothing to compare {outcome.baseline} with."
    chosen = next((one for one in others if one.steps is not None), others[0])
    best = f", the best of {len(others)}," if len(others) > 1 else ""
    return f"{_finding(chosen, outcome, best)} {_circumstances(outcome)}"


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
    both = (finalist, baseline)
    if names := _diverged(*both, horizon=outcome.horizon):
        return None, None, None, [f"not compared, because {names} diverged"]
    longest = [one.at(outcome.horizon) for one in both]
    seeds = sorted(longest[0].keys() & longest[1].keys())
    runs = [_by_horizon(one, seeds) for one in both]
    complete = [seed for seed in seeds if all(of[seed].finished for one in runs for of in one.values())]
    if not complete:
        return None, None, None, [f"not compared: no seed with a loss after {outcome.horizon} steps"]
    notes = []
    if len(complete) < len(outcome.seeds):
        notes.append(f"compared by {len(complete)} of {len(outcome.seeds)} seeds, of which all runs have a loss")
    if len(complete) == 1:
        notes.append("one seed gives no interval")
    losses = [{horizon: [of[seed].loss for seed in complete] for horizon, of in one.items()} for one in runs]
    own, other = (np.array(of[outcome.horizon]) for of in losses)
    difference = mean_interval(own - other)
    if names := _diverged(*both):
        return difference, None, None, [*notes, f"no ratios, because {names} diverged"]
    if len(losses[0]) == len(losses[1]) == 1:
        return difference, None, None, [*notes, "no ratios, which need shorter runs too"]
    steps = steps_ratio(*losses)
    times = [_seconds([[of[seed] for of in one.values()] for seed in complete]) for one in runs]
    seconds = None if times[0] is None or times[1] is None else seconds_ratio(steps, times[0], times[1])
    return difference, steps, seconds, notes


def _diverged(*finalists: Finalist, horizon: int | None = None) -> str:
    """Return the names of those that diverged, at one horizon or at any."""
    return " and ".join(
        finalist.name
        for finalist in finalists
        if any(run.diverged and horizon in (None, run.horizon) for run in finalist.runs)
    )


def _by_horizon(finalist: Finalist, seeds: Sequence[int]) -> dict[int, dict[int, FinalRun]]:
    """Return the runs of all horizons at which there is one of each seed, by horizon and seed."""
    by_horizon = {horizon: finalist.at(horizon) for horizon in sorted({run.horizon for run in finalist.runs})}
    return {horizon: runs for horizon, runs in by_horizon.items() if runs.keys() >= set(seeds)}


def _seconds(runs: Sequence[Sequence[FinalRun]]) -> Array | None:
    """Return the seconds per step for each seed, the geometric mean over its runs; ``None`` if one is not known."""
    times = [[run.result.seconds_per_step for run in of_seed] for of_seed in runs]
    if not all(time for of_seed in times for time in of_seed):
        return None
    return np.asarray(np.exp(np.log(np.array(times, float)).mean(1)))


def _finding(chosen: Standing, outcome: Outcome, best: str) -> str:
    name, baseline = chosen.name, outcome.baseline
    if chosen.steps is None:
        return f"There is no ratio of {name} to {baseline}: {'; '.join(chosen.notes)}."
    if chosen.steps.contains(1):
        return (
            f"Between {name} and {baseline} no difference was found: for the final loss of {baseline}, {name} needs"
            f" {_in_words(chosen.steps, 'steps')}."
        )
    seconds = "" if chosen.seconds is None else f" and {_in_words(chosen.seconds, 'seconds')}"
    return f"For the final loss of {baseline}, {name}{best} needs {_in_words(chosen.steps, 'steps')}{seconds}."


def _in_words(ratio: Interval, of: str) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.text()} times its {of}"
    interval = f"{ratio.low:.2f} to {ratio.high:.2f}"
    if ratio.value is None:
        return f"{interval} times its {of}"
    found = f", {NO_DIFFERENCE}" if ratio.contains(1) and of == "seconds" else ""
    return f"{ratio.value:.2f} times its {of} (95 % interval {interval}{found})"


def _circumstances(outcome: Outcome) -> str:
    """Return how it was measured."""
    setting = outcome.setting
    size = "" if setting.parameters is None else f" ({_large(setting.parameters)} parameters)"
    read = "" if setting.tokens_per_step is None else f" of {_large(setting.tokens_per_step)} {setting.unit}"
    device = f" on {setting.device}" if setting.device else ""
    horizons = outcome.horizons
    schedules = f" schedules of {_joined(horizons)} steps{read}," if horizons else ""
    tuned = sorted(len(finalist.tuning) for finalist in outcome)
    tuning = f"{tuned[0]}" if tuned[0] == tuned[-1] else f"{tuned[0]} to {tuned[-1]}"
    effort = f"each optimizer tuned in {tuning} runs" if tuned[-1] else "no optimizer tuned"
    seeds = f"{len(outcome.seeds)} seed{'s' if len(outcome.seeds) != 1 else ''}"
    return (
        f"Measured with {setting.task or 'one model'}{size}{device}: full{schedules} {seeds}, {effort}."
        " Small models do not speak for large ones."
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
