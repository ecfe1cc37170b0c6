"""Runs that differ in nothing but their seed, as one group."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_muon.report import differences
from lightning_muon.report.differences import Column
from lightning_muon.report.run_log import RunLog

Seed = tuple[int | str, ...]  # one, or that of the data too

# A run that ends before this part of the longest one with the same settings was interrupted, or goes on. The last
# logged step of two complete ones may differ a little.
_AS_LONG = 0.95
_LONGEST_LIST = 12  # characters of the seeds


@dataclass(frozen=True)
class Group:
    """Runs with the same settings and different seeds; most often a single one.

    Attributes:
        name: What tells it apart from the other groups: its settings that differ, or else the name of its run.
        runs: One for each seed.
        settings: Its value in each column of what differs.
        seeds: Those of the runs, in few characters; empty if they are many, or not known, or the same in all runs that
            are compared.
    """

    name: str
    runs: tuple[RunLog, ...]
    settings: tuple[str, ...] = ()
    seeds: str = ""

    @property
    def steps(self) -> int:
        """How many steps the longest run has made."""
        return max(run.steps for run in self.runs)


def group_runs(runs: Sequence[RunLog]) -> tuple[list[Group], list[Column]]:
    """Return runs in groups, and what differs between the groups.

    Runs belong together if their settings are the same, their seeds are known and different, and none of them ended
    much before the others; unless they may, since early stopping or a limit of time ends them.
    """
    settings = [run.settings for run in runs]
    columns = differences.columns(settings)
    seeds = differences.seeds(settings)
    alike: dict[tuple[str, ...], list[int]] = {}
    for place, run in enumerate(runs):
        values = tuple(column.values[place] for column in columns)
        alike.setdefault(values if run.settings is not None else (*values, str(place)), []).append(place)
    groups: list[Group] = []
    for same in alike.values():
        left = same
        while left:
            own = _together(left, runs, seeds)
            left = [place for place in left if place not in own]
            name = differences.describe(columns, own[0]) if settings[own[0]] is not None else ""
            values = tuple(column.values[own[0]] for column in columns)
            groups.append(Group(name, tuple(runs[place] for place in own), values, _listed(seeds[at] for at in own)))
    return _named(groups), columns


def _together(places: Sequence[int], runs: Sequence[RunLog], seeds: Sequence[Seed]) -> list[int]:
    """Return those of some runs with the same settings that are one group."""
    longest = max(runs[place].steps for place in places)
    may_end_early = any(_may_end_early(runs[place]) for place in places)
    long = [place for place in places if may_end_early or runs[place].steps >= _AS_LONG * longest]
    last = {seeds[place]: place for place in long}  # of several runs with the same seed the last one
    return sorted(last.values(), key=lambda place: _order(seeds[place]))


def _may_end_early(run: RunLog) -> bool:
    settings = run.settings or {}
    return any(key.endswith(".EarlyStopping") for key in settings) or settings.get("trainer.max_time") is not None


def _named(groups: Sequence[Group]) -> list[Group]:
    """Return groups with names that differ: that of the settings, with the steps or the name of a run if need be."""

    def run_name(group: Group) -> str:
        return group.runs[0].name if len(group.runs) == 1 else f"{len(group.runs)} seeds"

    names = [group.name or run_name(group) for group in groups]
    for further in (lambda group: f"{group.steps} steps", run_name):
        often = Counter(names)
        both = (f"{group.name or run_name(group)}, {further(group)}" for group in groups)
        names = [name if often[name] == 1 else other for name, other in zip(names, both, strict=True)]
    return [replace(group, name=name) for group, name in zip(groups, names, strict=True)]


def _listed(seeds: Iterable[Seed]) -> str:
    """Return seeds such as ``1–4, 7``; nothing if that is long."""
    seeds = list(seeds)
    numbers = [seed[0] for seed in seeds if len(seed) == 1 and isinstance(seed[0], int)]
    texts = _ranges(numbers) if len(numbers) == len(seeds) else ["/".join(map(str, seed)) for seed in seeds]
    text = ", ".join(texts)
    return text if len(text) <= _LONGEST_LIST or len(seeds) == 1 else ""


def _ranges(numbers: Iterable[int]) -> list[str]:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return [f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]


def _order(seed: Seed) -> list[tuple[bool, int, str]]:
    return [(isinstance(one, str), one if isinstance(one, int) else 0, str(one)) for one in seed]
