"""Which rank orthogonalizes what."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.sharding.sharding import Range, Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Unit:
    """A part of a parameter that one rank orthogonalizes: whole matrices, in one range of the parameter's elements.

    Args:
        start: Its first element in the parameter.
        shape: As a stack, (parts, …).
        layout: Where the matrices are in the stack.
        held: By rank of the group, the range of the parameter's elements which that rank holds of the unit.
        replicated: Whether every rank holds all of it.
        owner: The rank that orthogonalizes it.
    """

    start: int
    shape: tuple[int, ...]
    layout: MatrixLayout
    held: tuple[Range, ...]
    replicated: bool
    owner: int = -1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def cost(self) -> int:
        """What it costs to orthogonalize, up to a constant: min² · max multiplications a matrix."""
        fan_out, fan_in = self.layout.fans(self.shape)
        return self.layout.count(self.shape) * min(fan_out, fan_in) ** 2 * max(fan_out, fan_in)

    @property
    def holder(self) -> int | None:
        """The only rank that holds anything of it, if there is only one."""
        holders = [rank for rank, (start, stop) in enumerate(self.held) if stop > start]
        return holders[0] if len(holders) == 1 else None


Loads = defaultdict["ProcessGroup", list[int]]


def assign_owners(parameters: Iterable[tuple[Sharding, MatrixLayout]], loads: Loads) -> list[tuple[Unit, ...]]:
    """Cut parameters into units and give each unit to a rank of its group.

    What one rank holds whole stays there. The rest goes, most expensive first, to the rank with the least to do. This
    depends on nothing but the shapes and shardings, so that all ranks come to the same result by themselves.

    Args:
        parameters: The sharding and the layout of each, in an order that is the same on all ranks.
        loads: What the ranks of each group have to do already; what they are given is added.

    Returns:
        The units of each parameter.
    """
    parameters = list(parameters)
    units = [_cut(sharding, layout) for sharding, layout in parameters]
    travelling: list[tuple[int, int]] = []
    for index, (sharding, _) in enumerate(parameters):
        load = loads[sharding.group] = loads[sharding.group] or [0] * len(sharding.ranges)
        for number, unit in enumerate(units[index]):
            if unit.owner >= 0:
                load[unit.owner] += unit.cost
            else:
                travelling.append((index, number))
    travelling.sort(key=lambda place: -units[place[0]][place[1]].cost)
    for index, number in travelling:
        unit, load = units[index][number], loads[parameters[index][0].group]
        owner = load.index(min(load))
        load[owner] += unit.cost
        units[index][number] = replace(unit, owner=owner)
    return [tuple(of_parameter) for of_parameter in units]


def _cut(sharding: Sharding, layout: MatrixLayout) -> list[Unit]:
    """Cut a parameter where its matrices and its shards end; neighbours that one rank holds whole are one unit."""
    count, part, stack_layout = layout.parts(sharding.shape)
    size = math.prod(part)
    if size == 0 or count == 0:
        return []
    if sharding.replicated:  # as many units as ranks are enough to share the work
        bounds = _even(count, len(sharding.ranges))
    else:
        inside = [(-(-start // size), stop // size) for start, stop in sharding.ranges]
        bounds = sorted({0, count} | {bound for run in inside if run[0] < run[1] for bound in run})
        whole = {number for first, last in inside for number in range(first, last)}
        bounds = sorted({*bounds, *(n + k for n in range(count) if n not in whole for k in (0, 1))})
    units = []
    for first, last in pairwise(bounds):
        start, stop = first * size, last * size
        held = tuple(_overlap(range_, (start, stop)) for range_ in sharding.ranges)
        unit = Unit(start, (last - first, *part), stack_layout, held, sharding.replicated)
        units.append(replace(unit, owner=unit.holder) if unit.holder is not None else unit)
    return units


def _even(count: int, parts: int) -> list[int]:
    """Return the bounds of at most so many runs of 0 … count, alike in length."""
    parts = min(count, parts)
    return [count * i // parts for i in range(parts + 1)]


def _overlap(a: Range, b: Range) -> Range:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else (b[0], b[0])


def owned_elements(units: Sequence[Unit]) -> dict[int, int]:
    """Return how many elements each rank owns of some units."""
    owned: defaultdict[int, int] = defaultdict(int)
    for unit in units:
        owned[unit.owner] += unit.numel
    return dict(owned)
