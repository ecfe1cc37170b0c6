"""What the ranks exchange at a time."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_muon.optim.muon_update import batch_bound
from lightning_muon.optim.sharding.ownership import Unit, owned_elements
from lightning_muon.optim.sharding.sharding import Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a unit that another owns.

    Args:
        member: Position of the parameter in its round.
        unit: The unit.
        start: First element in the parameter.
        stop: The one behind the last.
    """

    member: int
    unit: Unit
    start: int
    stop: int


@dataclass(frozen=True)
class Round:
    """Parameters whose pieces travel together.

    Args:
        members: Positions of the parameters in their parameter group.
        shardings: Theirs, all over one process group.
        units: What each is cut into.
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
        """The units of this rank, each with the position of its parameter in the round."""
        return tuple((m, unit) for m, units in enumerate(self.units) for unit in units if unit.owner == self.rank)

    @cached_property
    def to_owners(self) -> tuple[tuple[Piece, ...], ...]:
        """By owner, the pieces which this rank sends to it, in the order of the units."""
        return self._pieces(lambda unit, rank: (unit.owner, rank), replicated=False)

    @cached_property
    def from_holders(self) -> tuple[tuple[Piece, ...], ...]:
        """By holder, the pieces which this rank receives from it before it can orthogonalize."""
        return self._pieces(lambda unit, rank: (rank, unit.owner), replicated=False)

    @cached_property
    def to_holders(self) -> tuple[tuple[Piece, ...], ...]:
        """By holder, the pieces of which this rank sends the polar factors back."""
        return self._pieces(lambda unit, rank: (rank, unit.owner), replicated=True)

    @cached_property
    def from_owners(self) -> tuple[tuple[Piece, ...], ...]:
        """By owner, the pieces of which this rank receives the polar factors."""
        return self._pieces(lambda unit, rank: (unit.owner, rank), replicated=True)

    @cached_property
    def gathers(self) -> bool:
        """Whether anything goes to the owners, from any rank."""
        return any(unit.holder is None and not unit.replicated for units in self.units for unit in units)

    @cached_property
    def scatters(self) -> bool:
        """Whether anything comes back from the owners, to any rank."""
        return any(unit.holder is None for units in self.units for unit in units)

    def _pieces(self, ends: Any, *, replicated: bool) -> tuple[tuple[Piece, ...], ...]:
        """Return by other rank the pieces for which ``ends(unit, holder)`` is (that rank, this rank)."""
        pieces: list[list[Piece]] = [[] for _ in range(self.group.size())]
        for member, units in enumerate(self.units):
            for unit in units:
                if unit.replicated and not replicated:
                    continue
                for holder, (start, stop) in enumerate(unit.held):
                    other, this = ends(unit, holder)
                    if stop > start and holder != unit.owner and this == self.rank:
                        pieces[other].append(Piece(member, unit, start, stop))
        return tuple(map(tuple, pieces))


def make_rounds(
    parameters: Iterable[tuple[int, Tensor, Sharding, tuple[Unit, ...]]], batch_elements: int | None
) -> Iterator[Round]:
    """Put parameters together that travel together: of one dtype, over one group.

    Costly parameters come first, as in the distribution of the work, so that in each round every rank has its share.
    A rank owns at most a batch of a round, or a single unit that is larger; of what is replicated, where the whole
    round arrives on each rank, the round as a whole is at most a batch, if that is a unit for each rank.

    Args:
        parameters: Position in the parameter group, the parameter, its sharding and its units, of each.
        batch_elements: Bound of a batch; None as on one device.
    """
    alike: defaultdict[Any, list[tuple[int, Sharding, tuple[Unit, ...]]]] = defaultdict(list)
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


def _split(members: Sequence[tuple[int, Sharding, tuple[Unit, ...]]], bound: int) -> Iterator[Round]:
    current: list[tuple[int, Sharding, tuple[Unit, ...]]] = []
    owned: defaultdict[int, int] = defaultdict(int)
    for member in members:
        new = owned_elements(member[2])
        if any(owned[rank] and owned[rank] + elements > bound for rank, elements in new.items()):
            yield Round(*zip(*current, strict=True))
            current, owned = [], defaultdict(int)
        current.append(member)
        for rank, elements in new.items():
            owned[rank] += elements
    if current:
        yield Round(*zip(*current, strict=True))
