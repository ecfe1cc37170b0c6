"""Buckets: parameters whose shards travel together, and the pieces that each rank sends and receives."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_muon.optim.sharding.sharding import Sharding, Unit
from lightning_muon.optim.update.batches import batch_bound

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Piece:
    """The elements from ``start`` to ``stop`` of a parameter, which are those that one rank has of a unit.

    ``member`` is the position of the parameter in its bucket.
    """

    member: int
    unit: Unit
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def key(self) -> tuple[int, int]:
        """What identifies its unit in the bucket: the position of the parameter, and the start of the unit in it."""
        return self.member, self.unit.start

    @property
    def in_unit(self) -> slice:
        """Where it is in its unit."""
        return slice(self.start - self.unit.start, self.stop - self.unit.start)


@dataclass(frozen=True)
class Bucket:
    """Parameters whose shards travel together.

    Args:
        members: Positions of the parameters in their parameter group.
        shardings: Their shardings, all over one process group.
        units: The units of each.
    """

    members: tuple[int, ...]
    shardings: tuple[Sharding, ...]
    units: tuple[tuple[Unit, ...], ...]

    @property
    def group(self) -> "ProcessGroup":
        """The ranks that take part."""
        return self.shardings[0].group

    @cached_property
    def rank(self) -> int:
        """This rank in the group."""
        return self.group.rank()

    @cached_property
    def owned(self) -> tuple[tuple[int, Unit], ...]:
        """The units of this rank, each with the position of its parameter in the bucket."""
        return tuple((m, unit) for m, units in enumerate(self.units) for unit in units if unit.owner == self.rank)

    @cached_property
    def here(self) -> tuple[Piece, ...]:
        """What this rank has of each unit; empty pieces included."""
        return tuple(Piece(m, unit, *unit.shards[self.rank]) for m, units in enumerate(self.units) for unit in units)

    def take(self, piece: Piece, shards: Sequence[Tensor]) -> Tensor:
        """Return a piece of this rank, shape (elements,), from its shards of the parameters."""
        first = self.shardings[piece.member].shard[0]
        return shards[piece.member].reshape(-1)[piece.start - first : piece.stop - first]

    @cached_property
    def to_owners(self) -> tuple[tuple[Piece, ...], ...]:
        """By owner, the pieces that this rank sends to it, in the order of the units."""
        return self._pieces(as_owner=False, replicated=False)

    @cached_property
    def from_shards(self) -> tuple[tuple[Piece, ...], ...]:
        """By rank, the pieces that this rank receives from it before it can orthogonalize."""
        return self._pieces(as_owner=True, replicated=False)

    @cached_property
    def to_shards(self) -> tuple[tuple[Piece, ...], ...]:
        """By rank, the pieces whose polar factors this rank sends back to it."""
        return self._pieces(as_owner=True, replicated=True)

    @cached_property
    def from_owners(self) -> tuple[tuple[Piece, ...], ...]:
        """By owner, the pieces whose polar factors this rank receives from it."""
        return self._pieces(as_owner=False, replicated=True)

    @cached_property
    def gathers(self) -> bool:
        """Whether any rank sends anything to an owner."""
        return any(unit.is_split for units in self.units for unit in units)

    @cached_property
    def scatters(self) -> bool:
        """Whether any owner sends anything back."""
        return any(unit.only_rank is None for units in self.units for unit in units)

    def _pieces(self, *, as_owner: bool, replicated: bool) -> tuple[tuple[Piece, ...], ...]:
        """Return by other rank the pieces that travel between it and this rank, which owns the unit or has a shard."""
        pieces: list[list[Piece]] = [[] for _ in range(self.group.size())]
        for member, units in enumerate(self.units):
            for unit in units:
                for rank, (start, stop) in enumerate(unit.shards):
                    this, other = (unit.owner, rank) if as_owner else (rank, unit.owner)
                    travels = stop > start and this != other and (replicated or not unit.replicated)
                    if travels and this == self.rank:
                        pieces[other].append(Piece(member, unit, start, stop))
        return tuple(map(tuple, pieces))


# The position of a parameter in its parameter group, its sharding and its units.
Member = tuple[int, Sharding, tuple[Unit, ...]]


def make_buckets(
    parameters: Iterable[tuple[int, Tensor, Sharding, tuple[Unit, ...]]], batch_elements: int | None
) -> Iterator[Bucket]:
    """Put parameters of one dtype and process group into buckets.

    Expensive parameters come first, as in the assignment of owners, so that every rank has work in each bucket. A rank
    owns at most a batch of elements in a bucket, or a single larger unit. Replicated parameters arrive whole on each
    rank, so their bucket as a whole is at most a batch, or a unit for each rank.

    Each parameter is given as its position in the parameter group, itself, its sharding and its units.
    """
    alike: defaultdict[Any, list[Member]] = defaultdict(list)
    bounds: dict[Any, int] = {}
    for index, param, sharding, units in parameters:
        if units:
            key = (sharding.group, sharding.replicated, param.device.type, param.dtype)
            alike[key].append((index, sharding, units))
            bounds[key] = batch_bound(batch_elements, param.device)
    for key, members in alike.items():
        group, is_replicated, *_ = key
        members.sort(key=lambda member: -max(unit.cost for unit in member[2]))
        yield from _split(members, bounds[key] // group.size() if is_replicated else bounds[key])


def _split(members: Sequence[Member], bound: int) -> Iterator[Bucket]:
    """Cut members into buckets in which no rank owns more than ``bound`` elements."""
    current: list[Member] = []
    owned: defaultdict[int, int] = defaultdict(int)
    for member in members:
        new: defaultdict[int, int] = defaultdict(int)
        for unit in member[2]:
            new[unit.owner] += unit.numel
        if any(owned[rank] and owned[rank] + elements > bound for rank, elements in new.items()):
            yield Bucket(*zip(*current, strict=True))
            current, owned = [], defaultdict(int)
        current.append(member)
        for rank, elements in new.items():
            owned[rank] += elements
    if current:
        yield Bucket(*zip(*current, strict=True))
