"""Optimizer state of which each rank keeps a share, for parameters that every rank holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muon.optim.sharding.sharding import Range, Sharding

State = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """Say of which elements of a parameter each rank keeps the state.

    Args:
        sharding: The parameter's.
        ranges: By rank of its group.
    """

    sharding: Sharding
    ranges: tuple[tuple[Range, ...], ...]

    @property
    def here(self) -> tuple[Range, ...]:
        """The ranges that this rank keeps."""
        return self.ranges[self.sharding.group.rank()]

    def size(self, rank: int) -> int:
        """Return how many elements a rank keeps."""
        return sum(stop - start for start, stop in self.ranges[rank])

    def part(self, tensor: Tensor) -> Tensor:
        """Return what this rank keeps of a whole tensor, shape (elements,); a view where it is one range."""
        flat = tensor.reshape(-1)
        parts = [flat[start:stop] for start, stop in self.here]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else flat[:0]


def kept_part(state: Mapping[str, Any], kept: Kept) -> State:
    """Return of the whole state of a parameter what this rank keeps; step counts are kept by all."""
    return {key: value if value.ndim == 0 else kept.part(value).clone() for key, value in state.items()}


def consolidate(
    parameters: Sequence[tuple[Tensor, Kept]], states: Mapping[Tensor, State], to: int
) -> list[State] | None:
    """Bring the state of parameters together on one rank. All ranks must call this.

    Args:
        parameters: The parameters whose state is shared out.
        states: What this rank keeps of their state.
        to: The rank in their groups that is to have it all.

    Returns:
        On that rank the whole state of each parameter, on the CPU; None on the others.
    """
    whole = [{k: v for k, v in states.get(p, {}).items() if v.ndim == 0} for p, _ in parameters]
    for group in dict.fromkeys(kept.sharding.group for _, kept in parameters):
        members = [index for index, (_, kept) in enumerate(parameters) if kept.sharding.group is group]
        described = [
            (index, key, value.dtype)
            for index in members
            for key, value in states.get(parameters[index][0], {}).items()
            if value.ndim > 0 and value.numel() > 0
        ]
        by_rank: list[Any] = [None] * group.size()
        dist.all_gather_object(by_rank, described, group=group)
        for rank, descriptions in enumerate(by_rank):
            for index, key, dtype in descriptions:
                param, kept = parameters[index]
                part = states[param][key] if group.rank() == rank else None
                if rank != to and part is not None:
                    dist.send(part, group=group, group_dst=to)
                if group.rank() == to:
                    if part is None:
                        part = torch.empty(kept.size(rank), dtype=dtype, device=param.device)
                        dist.recv(part, group=group, group_src=rank)
                    entry = whole[index].setdefault(key, torch.zeros(kept.sharding.shape, dtype=dtype))
                    _put(entry, part, kept.ranges[rank])
    is_there = all(kept.sharding.group.rank() == to for _, kept in parameters)
    return whole if is_there else None


def _put(whole: Tensor, part: Tensor, ranges: Sequence[Range]) -> None:
    pieces = part.split([stop - start for start, stop in ranges])
    for (start, stop), piece in zip(ranges, pieces, strict=True):
        whole.view(-1)[start:stop] = piece
