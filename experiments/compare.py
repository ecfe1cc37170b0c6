"""Compare optimizers: tune each by the same rules, train with paired seeds, and say how many steps each needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_muon.experiments.contestant import Contestant, Settings
from lightning_muon.experiments.outcome import Finalist, FinalRun, Outcome, Setting, TuningRun
from lightning_muon.experiments.protocol import Known, Protocol
from lightning_muon.experiments.tuning import ALL_AXES

Inspect = Callable[[Sequence[str]], Mapping[str, Any]]
_STATE_BYTES = "optimizer_state/bytes"
_DEFAULT_SEED = 42


class CompareError(ValueError):
    """A comparison cannot be made; the message is one line for the user."""


def protocol_of(
    optimizers: Sequence[str],
    arguments: Sequence[str],
    inspect: Inspect,
    *,
    seeds: int = 4,
    tuned: Sequence[str] = ALL_AXES,
) -> tuple[Protocol, int]:
    """Return the runs of a comparison, with the number of the model's parameters.

    Args:
        optimizers: Names of presets of the group ``optimizer``, or config files; the first is the baseline.
        arguments: The command line of ``fit`` that all runs share.
        inspect: Returns the settings of the optimizer that a command line makes: ``lr``, ``weight_decay``, ``rates`` of
            other roles, and ``steps``, ``accumulate``, ``seed`` and ``parameters`` of the run.
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
    protocol = Protocol(
        contestants, lengths[names[0]], int(found["accumulate"]), first, range(first + 1, first + 1 + seeds), tuned
    )
    return protocol, int(found["parameters"])


def definition(protocol: Protocol, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what all that work on a comparison must agree on, as plain values."""
    return {
        "arguments": list(arguments),
        "steps": protocol.steps,
        "accumulate": protocol.accumulate,
        "tuned": list(protocol.tuned),
        "seeds": [protocol.tuning_seed, *protocol.seeds],
        "optimizers": {
            one.name: {"configs": list(one.configs), **asdict(one.start), "coupled": sorted(one.coupled)}
            for one in protocol.contestants
        },
    }


def outcome(protocol: Protocol, known: Known, setting: Setting) -> Outcome:
    """Return what came of a comparison, as far as it has come."""
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
