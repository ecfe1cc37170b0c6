"""Where the elements of a parameter live."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Range = tuple[int, int]


@dataclass(frozen=True)
class Sharding:
    """Say which elements of a parameter each rank of a process group holds.

    Every rank holds one contiguous range of the elements in row-major order, be it whole rows (FSDP2), any piece
    (FSDP1), nothing, or everything (DDP). The description is the same on every rank of the group.

    Args:
        shape: Of the whole parameter.
        group: The ranks among which it is spread.
        ranges: By rank of the group, the first element that it holds and the one behind its last.
    """

    shape: torch.Size
    group: "ProcessGroup"
    ranges: tuple[Range, ...]

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the whole parameter."""
        return all(held == (0, self.shape.numel()) for held in self.ranges)

    @property
    def held(self) -> Range:
        """The range of this rank."""
        return self.ranges[self.group.rank()]


def replicated(shape: torch.Size, group: "ProcessGroup") -> Sharding:
    """Describe a parameter that is whole on every rank, with the same gradient, as under DDP."""
    return Sharding(shape, group, ((0, shape.numel()),) * group.size())


def chunks(number: int, ranks: int) -> tuple[Range, ...]:
    """Cut so many things into a range for each rank, as ``torch.chunk``: 6 on 4 ranks are 2, 2, 2 and 0."""
    chunk = -(-number // ranks)
    return tuple(pairwise(min(rank * chunk, number) for rank in range(ranks + 1)))


class Shardings(list[Sharding | None]):
    """The shardings of the parameters in a group, in their order; None for what needs no description.

    Process groups belong to a run: copies and checkpoints of a parameter group find nothing in here.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[()]]:
        """Pickle as something empty that ``torch.load`` also takes with ``weights_only=True``."""
        return OrderedDict, ()
