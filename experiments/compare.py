"""Compare optimizers: tune each by the same rules, train with paired seeds, and say how many steps each needs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_muon.experiments.contestant import Contestant, Settings
from lightning_muon.experiments.journal import Record
from lightning_muon.experiments.locks import StudyError
from lightning_muon.experiments.outcome import Finalist, FinalRun, Outcome, Setting, TuningRun
from lightning_muon.experiments.protocol import Known, Protocol
from lightning_muon.experiments.runs import Run
from lightning_muon.experiments.study import print_result, run_study
from lightning_muon.experiments.tuning import ALL_AXES
from lightning_muon.report.replaced import replaced

Inspect = Callable[[Sequence[str]], Mapping[str, Any]]
CONTESTANTS = "contestants.json"  # in the folder of the study: what was found of each optimizer

_STATE_BYTES = "optimizer_state/bytes"
_DEFAULT_SEED = 42
_OF_THE_RUN = ("steps", "accumulate", "seed", "parameters", "tokens_per_step")


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

    In the same folder, later comparisons with other optimizers run only what is new.

    Args:
        folder: Of the study.
        optimizers: Names of presets of the group ``optimizer``, or config files; the first is the baseline.
        arguments: The command line of ``fit`` that all runs share.
        run: The command line as a function.
        inspect: Returns of a command line of ``fit`` the settings of its optimizer: ``lr``, ``weight_decay``, ``rates``
            of other roles; and of the run ``steps``, ``accumulate``, ``seed``, ``task``, ``parameters``,
            ``tokens_per_step`` and ``device``.
        seeds: Number of seeds of the final runs.
        tuned: What is tuned, see :func:`~lightning_muon.experiments.tuning.axes_of`.
        metric: What is compared, as it is logged; lower is better.
        jobs: How many runs to have at a time.

    Returns:
        The protocol, and the record of each run.

    Raises:
        StudyError: If the optimizers cannot be compared, or the study cannot start or go on.
    """
    names = {Path(given).stem: given for given in optimizers}
    if len(names) < len(optimizers):
        raise StudyError(f"an optimizer is named twice in {', '.join(optimizers)}")
    if len(names) < 2:
        raise StudyError("a comparison needs two optimizers at least, such as --optimizers adamw,moonlight")
    if seeds < 2:
        raise StudyError(f"an interval needs two seeds at least, got {seeds}")
    known = _read(folder / CONTESTANTS)
    for name, given in names.items():
        if name not in known:
            known[name] = look_at(given, arguments, inspect)
            # Each takes seconds; and other workers may read the file at any time.
            folder.mkdir(parents=True, exist_ok=True)
            with replaced(folder / CONTESTANTS) as unfinished:
                unfinished.write_text(json.dumps(known, indent=1), encoding="utf-8")
    protocol = protocol_of({name: known[name] for name in names}, seeds, tuned)
    records = run_study(
        folder,
        {"tuned": list(tuned), "seeds": [protocol.tuning_seed, *protocol.seeds], "steps": protocol.steps},
        protocol.plan,
        run,
        arguments=arguments,
        metric=metric,
        jobs=jobs,
        on_result=print_result,
    )
    return protocol, records


def look_at(given: str, arguments: Sequence[str], inspect: Inspect) -> dict[str, Any]:
    """Return what ``inspect`` finds of an optimizer, its ``configs``, and which rates are ``coupled`` to its own."""
    configs = [given if Path(given).suffix else f"optimizer/{given}"]
    options = [*arguments, *(f"--config={config}" for config in configs)]
    found = inspect(options)
    # Whether the rates of other roles are its learning rate shows when that is another.
    doubled = inspect([*options, f"--model.optimizer.lr={2 * found['lr']}"])["rates"] if found["rates"] else {}
    coupled = [role for role in doubled if doubled[role] != found["rates"][role]]
    return {**found, "configs": configs, "coupled": coupled}


def protocol_of(found: Mapping[str, Mapping[str, Any]], seeds: int, tuned: Sequence[str]) -> Protocol:
    """Return the runs of a comparison.

    Args:
        found: What :func:`look_at` found of each optimizer, by its name; the first is the baseline.
        seeds: Number of seeds of the final runs.
        tuned: What is tuned.

    Raises:
        StudyError: If the runs differ in more than their optimizers, or an axis of the tuning is unknown.
    """
    contestants = tuple(
        Contestant(
            name,
            tuple(one["configs"]),
            Settings(one["lr"], one["weight_decay"], dict(one["rates"])),
            frozenset(one["coupled"]),
        )
        for name, one in found.items()
    )
    baseline, *others = found
    for name in others:
        for key in _OF_THE_RUN:
            if found[name][key] != found[baseline][key]:
                raise StudyError(
                    f"{key} is {found[baseline][key]} with {baseline} and {found[name][key]} with {name}: set it on the"
                    " command line, for all"
                )
    axes = {*ALL_AXES, *(role for one in contestants for role in one.start.rates)}
    if unknown := [axis for axis in tuned if axis not in axes]:
        raise StudyError(f"--tune does not know {', '.join(unknown)}; it knows {', '.join(sorted(axes))}")
    run = found[baseline]
    first = _DEFAULT_SEED if run["seed"] is None else run["seed"]
    return Protocol(
        contestants,
        steps=run["steps"],
        accumulate=run["accumulate"],
        tuning_seed=first,
        seeds=tuple(range(first + 1, first + 1 + seeds)),
        tuned=tuple(tuned),
        setting=Setting(
            run["task"], parameters=run["parameters"], tokens_per_step=run["tokens_per_step"], device=run["device"]
        ),
    )


def outcome(protocol: Protocol, records: Sequence[Record], metric: str) -> Outcome:
    """Return what came of a comparison, as far as it has come.

    Args:
        protocol: Its runs.
        records: Those that have been started.
        metric: What is compared.
    """
    known = {record.trial.name: record.result for record in records}
    setting = replace(protocol.setting, metric=metric)
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
    state = None if state is None else int(state)
    return Finalist(contestant.name, tuning.best.values(), tuple(tried), runs, tuning.at_edge, state)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found
