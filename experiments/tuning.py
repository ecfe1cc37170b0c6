"""Tune an optimizer: one setting after the other, each on a geometric grid that extends itself.

The search holds no state. It is asked again after each run, and goes through the losses that are known by then in the
same order: whoever continues it after a kill, or on another machine, asks for the same runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lightning_muon.experiments.contestant import Contestant, Settings

LEARNING_RATE, WEIGHT_DECAY = "lr", "weight_decay"
ROLES, EACH_ROLE = "roles", "each_role"  # the rates of all roles but the matrices, together and one by one
# In this order: with AdamW's one rate for all, embedding and head learn ten times too slowly, and a decay that is tuned
# then makes up for it. The rate of the matrices comes again at the end, because until then it was that of all roles.
ALL_AXES = (LEARNING_RATE, ROLES, EACH_ROLE, WEIGHT_DECAY)
MOST_POINTS = 9  # of a grid: with a factor of 2 it spans 256
MOST_AGAIN = 5  # in later rounds
MOST_ROUNDS = 3  # through all axes: what is tuned late may move the optimum of what was tuned before
SAME = 1.02  # values of an axis within this ratio are one value, which rounding has moved
_FIRST_DECAYS = (0.0, 0.03, 0.1)  # where the optimizer's own is zero


@dataclass(frozen=True)
class Axis:
    """A setting that is tuned.

    Args:
        name: ``lr``, ``weight_decay``, a role, whose learning rate it is, or ``roles``: those of all roles but the
            matrices, in their ratios.
        factor: Between neighbours of the grid.
    """

    name: str
    factor: float

    def value(self, settings: Settings) -> float:
        """Return the setting; of several roles the largest."""
        return max(settings.rates.values()) if self.name == ROLES else settings.values()[self.name]

    def with_value(self, settings: Settings, value: float, coupled: frozenset[str]) -> Settings:
        """Return settings that differ in this one, and in the rates of the roles that are coupled to it."""
        value = _rounded(value)
        if self.name == WEIGHT_DECAY:
            return replace(settings, weight_decay=value)
        moved = coupled if self.name == LEARNING_RATE else settings.rates if self.name == ROLES else (self.name,)
        by = value / self.value(settings)
        rates = {role: _rounded(rate * by) if role in moved else rate for role, rate in settings.rates.items()}
        return replace(settings, lr=value if self.name == LEARNING_RATE else settings.lr, rates=rates)

    def first_points(self, settings: Settings) -> list[float]:
        """Return the first values of the grid; a decay of zero is always among those of the decay."""
        center = self.value(settings)
        if self.name == WEIGHT_DECAY and center == 0:
            return list(_FIRST_DECAYS)
        zero = [0.0] if self.name == WEIGHT_DECAY else []
        return [*zero, center / self.factor, center, center * self.factor]


@dataclass(frozen=True)
class Search:
    """How far a search has come.

    Attributes:
        best: The best settings so far, in the end those that were found.
        wanted: Settings whose losses the search needs to go on; empty at its end.
        at_edge: Axes on which the best value lies at the end of a grid that may not grow any more.
        visited: The settings whose losses were used, each once, with the axis on which they were first needed.
    """

    best: Settings
    wanted: tuple[Settings, ...] = ()
    at_edge: tuple[str, ...] = ()
    visited: tuple[tuple[str, Settings], ...] = ()


def axes_of(contestant: Contestant, tuned: Sequence[str] = ALL_AXES) -> list[Axis]:
    """Return the axes of a contestant, in the order in which they are searched.

    Args:
        contestant: The optimizer. Without groups by role, or without weight decay, it has fewer axes.
        tuned: Of :data:`ALL_AXES`; and single roles, in place of ``each_role``.
    """
    rates = contestant.start.rates
    axes = [Axis(LEARNING_RATE, 2.0)] if LEARNING_RATE in tuned else []
    if ROLES in tuned and rates:
        axes.append(Axis(ROLES, 3.0))
    axes += [Axis(role, 3.0) for role in rates if EACH_ROLE in tuned or role in tuned]
    if WEIGHT_DECAY in tuned and contestant.start.weight_decay is not None:
        axes.append(Axis(WEIGHT_DECAY, 3.0))
    if LEARNING_RATE in tuned:
        axes.append(Axis(LEARNING_RATE, math.sqrt(2.0)))
    return axes


def search(contestant: Contestant, axes: Sequence[Axis], loss_of: Callable[[Settings], float | None]) -> Search:
    """Go through the axes, as far as losses are known, and again until a round finds nothing better.

    Args:
        contestant: Where the search starts, and which rates follow the learning rate until they have been tuned.
        axes: In their order. Later rounds leave out the coarse axis of the learning rate, if there is a finer one.
        loss_of: The loss of a run to the end of its schedule: infinite if it diverged, ``None`` if it has not run.
    """
    best, coupled = contestant.start, contestant.coupled
    walk = _Walk(loss_of)
    rates = [axis for axis in axes if axis.name == LEARNING_RATE]
    later = [axis for axis in axes if axis not in rates[:-1]]
    for number in range(MOST_ROUNDS):
        before = best
        for axis in later if number else axes:
            if axis.name in {ROLES, *contestant.start.rates}:
                coupled = frozenset()  # rates that have been compared with one another stay where they are
            best, wanted = walk.along(axis, best, coupled, MOST_AGAIN if number else MOST_POINTS)
            if wanted:
                return Search(best, wanted, visited=tuple(walk.visited.values()))
        if best == before or len(later) == 1:
            break
    edges = tuple(name for name, edge in walk.at_edge.items() if edge)
    return Search(best, at_edge=edges, visited=tuple(walk.visited.values()))


@dataclass
class _Walk:
    """What a search has seen on its way, as in :class:`Search`; ``tried`` has the values of each axis."""

    loss_of: Callable[[Settings], float | None]
    visited: dict[str, tuple[str, Settings]] = field(default_factory=dict)
    at_edge: dict[str, bool] = field(default_factory=dict)
    tried: dict[str, list[float]] = field(default_factory=dict)

    def along(
        self, axis: Axis, best: Settings, coupled: frozenset[str], most: int
    ) -> tuple[Settings, tuple[Settings, ...]]:
        """Return the best settings on an axis, and none wanted; or those before, and the settings to run first."""
        grid = axis.first_points(best)
        tried = self.tried.setdefault(axis.name, [])
        while True:
            values = sorted({_known_or_rounded(value, tried) for value in grid})
            points = {value: axis.with_value(best, value, coupled) for value in values}
            losses = {value: self.loss_of(settings) for value, settings in points.items()}
            if wanted := tuple(points[value] for value, loss in losses.items() if loss is None):
                return best, wanted
            tried += values
            for settings in points.values():
                self.visited.setdefault(str(settings), (axis.name, settings))
            # Of equal losses, such as infinite ones, the lowest value is the safest.
            found = min(points, key=lambda value: (losses[value], value))
            lowest, *_, highest = (value for value in points if value > 0)
            self.at_edge[axis.name] = found in (lowest, highest)
            if not self.at_edge[axis.name] or len(grid) >= most:
                return points[found], ()
            grid.append(found / axis.factor if found == lowest else found * axis.factor)


def _known_or_rounded(value: float, tried: Sequence[float]) -> float:
    """Return the first value of those tried that is as good as the same: a value that is reached in two ways is one."""
    return next((one for one in tried if one and 1 / SAME < value / one < SAME), _rounded(value))


def _rounded(value: float) -> float:
    """Return three significant digits."""
    return float(f"{value:.3g}")
