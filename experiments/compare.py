"""Compare optimizers: tune each by the same rules, train with paired seeds, and say how many steps each needs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_muon.experiments.contestant import Contestant, Settings
from lightning_muon.experiments.outcome import Finalist, FinalRun, Outcome, Setting, TuningRun
from lightning_muon.experiments.journal import Record, definition_of
from lightning_muon.experiments.protocol import Known, Protocol
from lightning_muon.experiments.runs import Run
from lightning_muon.experiments.study import print_result, run_study
from lightning_muon.experiments.tuning import ALL_AXES

Inspect = Callable[[Sequence[str]], Mapping[str, Any]]
_STATE_BYTES = "optimizer_state/bytes"
_DEFAULT_SEED = 42


class CompareError(ValueError):
    """A comparison cannot be made; the message is one line for the user."""


def compare(
    folder: Path,
    optimizers: Sequence[str],
    arguments: Sequence[str],
    *,
    run: Run,
    inspect: Inspect,
    seeds: int = 4,
    tuned: Sequence[str] = ALL_AXES,
    metric: str = "val/loss",
    jobs: int = 1,
) -> tuple[Protocol, list[Record]]:
    """Run a comparison to its end, or go on with it; any number of workers may do the same at the same time.

    Args:
        folder: Of the study.
        optimizers: Names of presets of the group ``optimizer``, or config files; the first is the baseline.
        arguments: The command line of ``fit`` that all runs share.
        run: The command line as a function.
        inspect: Returns what :func:`protocol_of` needs of a command line of ``fit``.
        seeds: Number of seeds of the final runs.
        tuned: What is tuned, see :func:`~lightning_muon.experiments.tuning.axes_of`.
        metric: What is compared, as it is logged; lower is better.
        jobs: How many runs to have at a time.

    Returns:
        The protocol, and the record of each run.

    Raises:
        CompareError: If the optimizers cannot be compared.
        StudyError: If the study cannot start, or go on.
    """
    asked = {"optimizers": list(optimizers), "seeds": seeds, "tuned": list(tuned)}
    known = definition_of(folder) or {}
    if {key: known.get(key) for key in asked} == asked and known["arguments"] == list(arguments):
        protocol = Protocol.from_plain(known["protocol"])  # the optimizers have been looked at
    else:
        protocol = protocol_of(optimizers, arguments, inspect, seeds=seeds, tuned=tuned)
    definition = {**asked, "protocol": protocol.to_plain()}
    records = run_study(
        folder, definition, protocol.plan, run, arguments=arguments, metric=metric, jobs=jobs, on_result=print_result
    )
    return protocol, records


def protocol_of(
    optimizers: Sequence[str],
    arguments: Sequence[str],
    inspect: Inspect,
    *,
    seeds: int = 4,
    tuned: Sequence[str] = ALL_AXES,
) -> Protocol:
    """Return the runs of a comparison.

    Args:
        optimizers: Names of presets of the group ``optimizer``, or config files; the first is the baseline.
        arguments: The command line of ``fit`` that all runs share.
        inspect: Returns of a command line of ``fit`` the settings of its optimizer: ``lr``, ``weight_decay``, ``rates``
            of other roles; and of the run ``steps``, ``accumulate``, ``seed``, ``parameters`` and ``tokens_per_step``.
        seeds: Number of seeds of the final runs.
        tuned: What is tuned, see :func:`~lightning_muon.experiments.tuning.axes_of`.

    Raises:
        CompareError: If fewer than two optimizers are given, or one twice, or the runs differ in their lengths.
    """
    names = [Path(name).stem for name in optimizers]
    if len(set(names)) != len(names):
        raise CompareError(f"an optimizer is named twice in {', '.join(optimizers)}")
    if len(names) < 2:
        raise CompareError("a comparison needs two optimizers at least, such as --optimizers adamw,moonlight")
    if seeds < 2:
        raise CompareError(f"an interval needs at least 2 seeds, got {seeds}")
    contestants = []
    lengths = {}
    for name, given in zip(names, optimizers, strict=True):
        configs = (given if Path(given).suffix else f"optimizer/{given}",)
        found = inspect([*arguments, *(f"--config={config}" for config in configs)])
        contestants.append(_contestant(name, configs, found, arguments, inspect))
        lengths[name] = int(found["steps"])
    if len(set(lengths.values())) > 1:
        raise CompareError(f"the runs have different lengths in steps: {lengths}; give --trainer.max_steps")
    known = {role for contestant in contestants for role in contestant.start.rates}
    if unknown := [axis for axis in tuned if axis not in {*ALL_AXES, *known}]:
        raise CompareError(
            f"--tune does not know {', '.join(unknown)}; it knows {', '.join([*ALL_AXES, *sorted(known)])}"
        )
    first = found["seed"] if found["seed"] is not None else _DEFAULT_SEED
    return Protocol(
        tuple(contestants),
        steps=lengths[names[0]],
        accumulate=int(found["accumulate"]),
        tuning_seed=first,
        seeds=tuple(range(first + 1, first + 1 + seeds)),
        tuned=tuple(tuned),
        parameters=int(found["parameters"]),
        tokens_per_step=found["tokens_per_step"],
    )


def outcome(protocol: Protocol, records: Sequence[Record], metric: str, device: str = "", task: str = "") -> Outcome:
    """Return what came of a comparison, as far as it has come.

    Args:
        protocol: Its runs.
        records: Those that have been started.
        metric: What is compared.
        device: What the runs ran on, in a few words.
        task: What was trained on what, in a few words.
    """
    known = {record.trial.name: record.result for record in records}
    setting = Setting(task, metric, protocol.parameters, protocol.tokens_per_step, device=device)
    finalists = tuple(_finalist(protocol, contestant, known) for contestant in protocol.contestants)
    return Outcome(protocol.baseline.name, finalists, setting)


def _finalist(protocol: Protocol, contestant: Contestant, known: Known) -> Finalist:
    tuning = protocol.tuning(contestant, known)
    tried = []
    for stage, settings in tuning.visited:
        if result := known[protocol.trial(contestant, settings, protocol.steps, protocol.tuning_seed).name]:
            tried.append(TuningRun(stage, settings.values(), result.status, result.value))
    runs = tuple(
        FinalRun(steps, seed, result)
        for steps in protocol.horizons(contestant, known)
        for seed, result in protocol.final_results(contestant, steps, known).items()
    )
    state = next((run.result.figures[_STATE_BYTES] for run in runs if _STATE_BYTES in run.result.figures), None)
    return Finalist(
        contestant.name,
        tuning.best.values(),
        tuple(tried),
        runs,
        tuning.at_edge,
        None if state is None else int(state),
    )


def _contestant(
    name: str, configs: tuple[str, ...], found: Mapping[str, Any], arguments: Sequence[str], inspect: Inspect
) -> Contestant:
    start = Settings(found["lr"], found["weight_decay"], dict(found["rates"]))
    # Whether the rates of other roles are its learning rate's shows when that is another.
    others = [f"--config={config}" for config in configs] + [f"--model.optimizer.lr={2 * start.lr}"]
    doubled = inspect([*arguments, *others])["rates"] if start.rates else {}
    return Contestant(name, configs, start, frozenset(role for role in doubled if doubled[role] != start.rates[role]))
