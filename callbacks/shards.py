"""Shards: what a rank holds of a tensor, norms of it, and values combined over ranks."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from lightning_muon.optim.sharding.dtensor import is_dtensor, local_tensor
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.update.state import HALF

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Groups = tuple[ProcessGroup | None, ...]
Owner = TypeVar("Owner", bound=Hashable)


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a tensor, and the ranks that hold the rest."""

    local: Tensor  # all elements, some rows, any flat range, or none
    groups: Groups = ()  # one for each mesh dimension along which it is sharded; no replicas; None is all ranks


# For values of a rank's own, such as times or outputs.
EACH_RANK = Shard(torch.empty(0), (None,))


class OverRanks(NamedTuple):
    """Values of n tensors, each combined over the ranks that share it; float64 on the CPU."""

    sum: Tensor  # (quantities, n)
    norm: Tensor  # (quantities, n), Euclidean
    max: Tensor  # (quantities, n); NaN if one is NaN
    entries: Tensor  # (n,), global numbers of elements


def find_shards(trainer: Trainer, tensors: Sequence[Tensor]) -> list[Shard]:
    """Return what this rank holds of each parameter, and which ranks hold the rest. No communication."""
    flattened = _fsdp1_groups(trainer.strategy.model) if trainer.world_size > 1 else {}
    return [
        Shard(local_tensor(t.detach()), _mesh_groups(t) if is_dtensor(t) else flattened.get(id(t), ())) for t in tensors
    ]


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return what this rank holds of each parameter's gradient; an empty tensor where there is no gradient."""
    return [torch.empty(0, device=p.device) if p.grad is None else local_tensor(p.grad.detach()) for p in parameters]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shards of all ranks. A collective of all ranks if the tensor is a DTensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor.detach()


def entry_norms(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor's entries, shape (tensors,), float32 on the device of the first."""
    tensors = list(tensors)
    batches: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        batches[tensor.device, tensor.dtype].append(index)
    if len(batches) == 1:
        return _norms_alike(tensors)
    norms = torch.empty(len(tensors), device=tensors[0].device if tensors else None)
    for members in batches.values():
        norms[members] = _norms_alike([tensors[i] for i in members]).to(norms.device)
    return norms


def _norms_alike(tensors: list[Tensor]) -> Tensor:
    """Return the norms of tensors on one device and in one precision, at least one."""
    # Half precision is too narrow for the sum of squares.
    widened = torch.float32 if tensors[0].dtype in HALF else None
    return torch.stack(torch._foreach_norm(tensors, dtype=widened)).float()


def largest_entries(tensors: Iterable[Tensor]) -> Tensor:
    """Return the largest magnitude of each tensor's entries, like :func:`entry_norms`; 0 if empty, NaN if one is."""
    tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if not tensors:
        return torch.empty(0)
    # Both extremes, rather than abs(): one pass through memory, and no copy.
    extremes = [value.to(tensors[0].device, torch.float32) for tensor in tensors for value in torch.aminmax(tensor)]
    return torch.stack(extremes).view(-1, 2).abs().amax(1)


def over_ranks(
    trainer: Trainer, shards: Sequence[Shard], measured: Sequence[Tensor], entries: Sequence[int] | None = None
) -> OverRanks:
    """Combine what each rank measured of its shards; the result is the same on all ranks. A collective.

    Every rank passes shards of the same tensors in the same order, even if they are empty. The values are gathered and
    combined here, because no backend promises that the maximum with a NaN is NaN.

    Args:
        trainer: The trainer with the ranks.
        shards: n shards.
        measured: Quantities, each of shape (n,).
        entries: Numbers of elements on this rank. Default: those of the shards.
    """
    device = trainer.strategy.root_device
    sizes = [shard.local.numel() for shard in shards] if entries is None else entries
    quantities = [*measured, torch.tensor(sizes, dtype=torch.float32)]
    values = torch.stack([quantity.to(device, torch.float32) for quantity in quantities])
    if trainer.world_size == 1 or not shards:
        found = _combine(values.unsqueeze(0))
    else:
        alike: defaultdict[Groups, list[int]] = defaultdict(list)
        for index, shard in enumerate(shards):
            alike[shard.groups].append(index)
        found = torch.empty(3, *values.shape, dtype=torch.float64)
        for groups, members in alike.items():
            of_ranks = values[:, members].unsqueeze(0)
            for group in groups:
                of_ranks = _gather(of_ranks, group)
            found[:, :, members] = _combine(of_ranks)
        # Replicas have the same weights, but may have added them up in another order.
        found = found.to(device)
        dist.broadcast(found, src=0)
    found = found.cpu()
    sums, norms, maxima = found[:, :-1]
    return OverRanks(sums, norms, maxima, entries=found[0, -1])


def names_with_gradient(trainer: Trainer, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters with a gradient on any rank: not all hold elements. A collective."""
    found = any_over_ranks(trainer, [parameter.grad is not None for parameter in parameters.values()])
    return [name for name, has_gradient in zip(parameters, found, strict=True) if has_gradient]


def any_over_ranks(trainer: Trainer, flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on any rank. A collective."""
    if trainer.world_size == 1 or not flags:
        return list(flags)
    return [bool(flag) for flag in largest_over_ranks(trainer, torch.tensor(flags, dtype=torch.float32)).tolist()]


def largest_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """Return the largest of each value over the ranks, in the shape of ``values``; NaN if one is. A collective."""
    if trainer.world_size == 1:
        return values
    return _gather(values.to(trainer.strategy.root_device).unsqueeze(0), dist.group.WORLD).amax(0).to(values.device)


def worst_over_ranks(
    trainer: Trainer, owners: Iterable[Owner], measured: Iterable[tuple[Sequence[Owner], Tensor]], columns: int
) -> dict[Owner, list[float]]:
    """Return the largest of each value of an owner, over its rows and over the ranks; NaN if one is. A collective.

    Args:
        trainer: The trainer with the ranks.
        owners: The owners, the same on all ranks.
        measured: Owners of n rows, and their values (n, columns). An owner without rows on any rank is left out.
        columns: Number of values in a row.
    """
    worst = {owner: [-math.inf] * columns for owner in owners}
    for owners_of_rows, values in measured:
        for owner, row in zip(owners_of_rows, values.tolist(), strict=True):
            worst[owner] = [b if b > a or math.isnan(b) else a for a, b in zip(worst[owner], row, strict=True)]
    found = largest_over_ranks(trainer, torch.tensor(list(worst.values()), dtype=torch.float64)).tolist()
    return {owner: values for owner, values in zip(worst, found, strict=True) if values[0] != -math.inf}


def _combine(of_ranks: Tensor) -> Tensor:
    """Return sums, norms and maxima over the ranks of values (ranks, …), shape (3, …), float64 on the CPU."""
    wide = of_ranks.cpu().double()  # the only synchronization with the device
    return torch.stack([wide.sum(0), torch.linalg.vector_norm(wide, dim=0), wide.amax(0)])


def _gather(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Gather (r, …) from w ranks as (w·r, …)."""
    gathered = values.new_empty(dist.get_world_size(group) * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(gathered, values.contiguous(), group=group)
    return gathered


def _mesh_groups(tensor: "DTensor") -> Groups:
    """Return the ranks that share a DTensor: a group for each mesh dimension along which it is sharded."""
    placements = enumerate(tensor.placements)
    return tuple(tensor.device_mesh.get_group(dim) for dim, placement in placements if placement.is_shard())


def _fsdp1_groups(model: nn.Module | None) -> dict[int, Groups]:
    """Return by a parameter's ``id`` the ranks over which FSDP1 has sharded it."""
    groups: dict[int, Groups] = {}
    for wrapper in model.modules() if model is not None else ():  # from outside in: the innermost wrapper counts
        if isinstance(wrapper, FullyShardedDataParallel):
            replicated = wrapper.sharding_strategy is ShardingStrategy.NO_SHARD
            sharded: Groups = () if replicated else (wrapper.process_group,)
            groups |= {id(p): sharded for p in wrapper.parameters() if is_flattened(p)}
    return groups
