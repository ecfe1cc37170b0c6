"""What each rank holds of a matrix, and how what the ranks measured comes together."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a tensor.

    Args:
        local: Its elements here: all of them, some rows, any flat range, or none.
        groups: The ranks that hold the rest, a group for each dimension of a mesh along which the tensor is sharded.
            Replicas are not among them. Empty where this rank holds everything; None is all ranks.
    """

    local: Tensor
    groups: tuple[ProcessGroup | None, ...] = ()


class OverRanks(NamedTuple):
    """Numbers about n tensors over all ranks that share each, shape (quantities, n), float64 on the CPU.

    Args:
        sum: The sums of what the ranks measured.
        norm: The roots of the sums of its squares.
        max: The largest; NaN if one is.
    """

    sum: Tensor
    norm: Tensor
    max: Tensor


def find_shards(trainer: Trainer, tensors: Sequence[Tensor]) -> list[Shard]:
    """Tell for each parameter what this rank holds and who holds the rest. No communication."""
    flattened = _fsdp1_groups(trainer.strategy.model) if trainer.world_size > 1 else {}
    return [_shard(tensor.detach(), flattened.get(id(tensor), ())) for tensor in tensors]


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return what this rank holds of each parameter's gradient; without one, nothing."""
    gradients = ((parameter, parameter.grad) for parameter in parameters)
    return [torch.empty(0, device=p.device) if g is None else _shard(g, ()).local for p, g in gradients]


def sizes(shards: Sequence[Shard]) -> Tensor:
    """Return how many elements this rank holds of each, shape (n,)."""
    return torch.tensor([shard.local.numel() for shard in shards], dtype=torch.float32)


def over_ranks(trainer: Trainer, shards: Sequence[Shard], measured: Sequence[Tensor]) -> OverRanks:
    """Bring together what each rank measured of its shards; all ranks get the same numbers.

    A collective: every rank calls this with shards of the same tensors in the same order, whatever it holds of them.
    The numbers are gathered and combined here, because no backend promises that the maximum of a NaN is a NaN.

    Args:
        trainer: Knows the ranks.
        shards: n of them.
        measured: Quantities, each of shape (n,).
    """
    device = trainer.strategy.root_device
    values = torch.stack([quantity.to(device, torch.float32) for quantity in measured])
    if trainer.world_size == 1 or not shards:
        return _combined(values.unsqueeze(0))
    alike: defaultdict[tuple[ProcessGroup | None, ...], list[int]] = defaultdict(list)
    for index, shard in enumerate(shards):
        alike[shard.groups].append(index)
    found = torch.empty(len(OverRanks._fields), *values.shape, dtype=torch.float64)
    for groups, members in alike.items():
        of_ranks = values[:, members].unsqueeze(0)
        for group in groups:
            of_ranks = _gather(of_ranks, group)
        found[:, :, members] = torch.stack(_combined(of_ranks))
    # Replicas see the same weights, but need not have added them up in the same order.
    found = found.to(device)
    dist.broadcast(found, src=0)
    return OverRanks(*found.cpu())


def names_with_gradient(trainer: Trainer, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return those that have a gradient on any rank: where a rank holds nothing it has none. A collective of all."""
    if trainer.world_size == 1:
        return [name for name, parameter in parameters.items() if parameter.grad is not None]
    here = torch.tensor([float(parameter.grad is not None) for parameter in parameters.values()])
    anywhere = largest_over_ranks(trainer, here).tolist()
    return [name for name, has in zip(parameters, anywhere, strict=True) if has]


def largest_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """Return the largest of what the ranks have of each number, shape (n,); NaN if one is. A collective of all."""
    if trainer.world_size == 1:
        return values
    return _gather(values.to(trainer.strategy.root_device).unsqueeze(0), dist.group.WORLD).amax(0).to(values.device)


def _combined(of_ranks: Tensor) -> OverRanks:
    wide = of_ranks.cpu().double()  # the only wait for the device
    return OverRanks(wide.sum(0), torch.linalg.vector_norm(wide, dim=0), wide.amax(0))


def _gather(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Gather (r, …) from w ranks as (w·r, …)."""
    gathered = values.new_empty(dist.get_world_size(group) * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(gathered, values.contiguous(), group=group)
    return gathered


def _shard(tensor: Tensor, groups: tuple[ProcessGroup | None, ...]) -> Shard:
    if not isinstance(tensor, DTensor):
        return Shard(tensor, groups)
    spread = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    return Shard(tensor.to_local(), tuple(tensor.device_mesh.get_group(dim) for dim in spread))


def _fsdp1_groups(model: nn.Module | None) -> dict[int, tuple[ProcessGroup | None, ...]]:
    """Return by parameter's ``id`` the ranks over which FSDP1 has spread it."""
    groups: dict[int, tuple[ProcessGroup | None, ...]] = {}
    for wrapper in model.modules() if model is not None else ():  # outer ones first, so that the nearest counts
        if isinstance(wrapper, FullyShardedDataParallel):
            whole = wrapper.sharding_strategy is ShardingStrategy.NO_SHARD
            spread: tuple[ProcessGroup | None, ...] = () if whole else (wrapper.process_group,)
            groups |= {id(p): spread for p in wrapper.parameters() if getattr(p, "_fsdp_flattened", False)}
    return groups
