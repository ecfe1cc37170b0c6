"""Which elements of a parameter each rank has: flat ranges, and the units that one rank orthogonalizes."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from lightning_muon.optim.update.matrix_layout import MatrixLayout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The first element, and the one behind the last.
Range = tuple[int, int]


@dataclass(frozen=True)
class Sharding:
    """Describe which elements of a parameter each rank of a process group has.

    The shard of a rank is one contiguous range of the elements in row-major order: whole rows (FSDP2), any piece
    (FSDP1), nothing, or everything (DDP). The description is the same on every rank of the group.

    Args:
        shape: Shape of the whole parameter.
        group: The ranks over which it is distributed.
        ranges: The shard of each rank of the group.
    """

    shape: torch.Size
    group: "ProcessGroup"
    ranges: tuple[Range, ...]

    @property
    def replicated(self) -> bool:
        """Whether every rank has the whole parameter."""
        return all(shard == (0, self.shape.numel()) for shard in self.ranges)

    @property
    def shard(self) -> Range:
        """The range of this rank."""
        return self.ranges[self.group.rank()]


def replicated(shape: torch.Size, group: "ProcessGroup") -> Sharding:
    """Describe a parameter that is whole on every rank, with the same gradient, as under DDP."""
    return Sharding(shape, group, ((0, shape.numel()),) * group.size())


def chunks(number: int, ranks: int) -> tuple[Range, ...]:
    """Cut a number of things into a range for each rank, as ``torch.chunk``: 6 on 4 ranks are 2, 2, 2 and 0."""
    chunk = -(-number // ranks)
    return tuple(pairwise(min(rank * chunk, number) for rank in range(ranks + 1)))


class Shardings(list[Sharding | None]):
    """The shardings of the parameters in a group, in their order; ``None`` for those that need no description.

    Process groups belong to a run, so copies and checkpoints of a parameter group contain an empty list instead.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[()]]:
        """Pickle as an empty container that ``torch.load`` also takes with ``weights_only=True``."""
        return OrderedDict, ()


@dataclass(frozen=True)
class Unit:
    """Whole matrices of a parameter, in one range of its elements, which one rank orthogonalizes.

    Args:
        start: Its first element in the parameter.
        shape: As a stack, (parts, …).
        layout: Where the matrices are in the stack.
        shards: For each rank of the group, the range of the parameter's elements that it has of the unit.
        replicated: Whether every rank has all of it.
        owner: The rank that orthogonalizes it; -1 until it is assigned.
    """

    start: int
    shape: tuple[int, ...]
    layout: MatrixLayout
    shards: tuple[Range, ...]
    replicated: bool
    owner: int = -1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.layout.count(self.shape)

    @property
    def fans(self) -> list[tuple[int, int]]:
        """Fan-out, the number of neurons, and fan-in of a matrix of each shape."""
        return self.layout.fans(self.shape)

    @property
    def counts(self) -> list[int]:
        """Number of matrices of each shape."""
        return self.layout.counts(self.shape)

    @property
    def cost(self) -> int:
        """Cost of orthogonalizing it, up to a constant: min² · max multiplications a matrix."""
        shapes = zip(self.counts, self.fans, strict=True)
        return sum(count * min(fans) ** 2 * max(fans) for count, fans in shapes)

    @property
    def only_rank(self) -> int | None:
        """The rank that has all of it, if no other rank has any."""
        ranks = [rank for rank, (start, stop) in enumerate(self.shards) if stop > start]
        return ranks[0] if len(ranks) == 1 else None

    @property
    def is_split(self) -> bool:
        """Whether several ranks have different elements of it."""
        return self.only_rank is None and not self.replicated


def cut_into_units(sharding: Sharding, layout: MatrixLayout) -> list[Unit]:
    """Cut a parameter at the ends of its matrices and shards; neighbours that are whole on one rank are one unit.

    A unit that only one rank has is owned by it already.
    """
    units: list[Unit] = []
    first = 0
    for count, part, stack_layout in layout.parts(sharding.shape):
        units += _cut_run(sharding, first, count, part, stack_layout)
        first += count * math.prod(part)
    return units


def _cut_run(
    sharding: Sharding, first: int, count: int, part: tuple[int, ...], stack_layout: MatrixLayout
) -> Iterator[Unit]:
    """Cut equal parts of a parameter, which begin at an element of it, into units."""
    size = math.prod(part)
    if size == 0 or count == 0:
        return
    if sharding.replicated:  # as many units as ranks are enough to share the work
        runs = min(count, len(sharding.ranges))
        bounds = [count * i // runs for i in range(runs + 1)]
    else:
        of_run = [_overlap(shard, (first, first + count * size)) for shard in sharding.ranges]
        inside = [(-(-(start - first) // size), (stop - first) // size) for start, stop in of_run]
        bounds = sorted({0, count} | {bound for run in inside if run[0] < run[1] for bound in run})
        whole = {number for low, high in inside for number in range(low, high)}
        bounds = sorted({*bounds, *(n + k for n in range(count) if n not in whole for k in (0, 1))})
    for low, high in pairwise(bounds):
        start, stop = first + low * size, first + high * size
        shards = tuple(_overlap(shard, (start, stop)) for shard in sharding.ranges)
        unit = Unit(start, (high - low, *part), stack_layout, shards, sharding.replicated)
        yield replace(unit, owner=unit.only_rank) if unit.only_rank is not None else unit


def _overlap(a: Range, b: Range) -> Range:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else (b[0], b[0])
