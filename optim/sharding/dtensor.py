"""Adapter: DTensors, as FSDP2, HSDP and tensor parallelism make them."""

import math
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

from lightning_muon.optim.sharding.sharding import Sharding, chunks, replicated

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor, without importing the module of DTensors, which takes seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, as a view: what is written to it is written to the tensor."""
    if not is_dtensor(tensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local


def local_gradient(parameter: Tensor, gradient: Tensor, name: str) -> Tensor:
    """Return this rank's shard of the gradient of the parameter ``name``.

    Raises:
        ValueError: If the gradient has other placements than the parameter.
    """
    if is_dtensor(parameter) and (not is_dtensor(gradient) or gradient.placements != parameter.placements):
        found = gradient.placements if is_dtensor(gradient) else "a plain tensor"
        raise ValueError(
            f"{name} is placed as {parameter.placements}, but its gradient is {found}:"
            " redistribute the gradient before the step"
        )
    return local_tensor(gradient)


def laid_out_as(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole tensor like a parameter, if the parameter is a DTensor of its shape. No communication.

    ``value`` must be the same on all ranks, such as state from a checkpoint of one device.
    """
    if not is_dtensor(parameter) or is_dtensor(value) or value.shape != parameter.shape or value.ndim == 0:
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - it takes seconds, and is loaded already

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def with_shard(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor in the layout of a parameter of which this rank has these elements. No communication."""
    if not is_dtensor(parameter):
        return shard.view(parameter.shape)
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - it takes seconds, and is loaded already

    local = shard.reshape(parameter.to_local().shape).contiguous()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def dtensor_sharding(parameter: "DTensor") -> Sharding | None:
    """Describe a DTensor whose rows are sharded over one dimension of its mesh, and replicated along the others.

    Each replica of HSDP does the same work by itself. It is deterministic, so the replicas stay equal without
    communication between them. The result is over the ranks that together have the parameter; it is ``None`` where this
    rank has all of it.
    """
    mesh = parameter.device_mesh
    sharded = _sharded_dims(parameter)
    if not sharded:
        return replicated(parameter.shape, mesh.get_group()) if mesh.ndim == 1 else None
    group = mesh.get_group(sharded[0])
    row = math.prod(parameter.shape[1:])
    ranges = tuple((start * row, stop * row) for start, stop in chunks(parameter.shape[0], group.size()))
    return Sharding(parameter.shape, group, ranges)


def is_sharded_by_rows(parameter: "DTensor") -> bool:
    """Return whether each rank has one range of rows, or all; not so for column shards of tensor parallelism."""
    placements: list[Any] = [parameter.placements[dim] for dim in _sharded_dims(parameter)]
    # The exact class: a strided shard is a subclass of Shard, but its rows are in another order.
    return all(type(p).__name__ == "Shard" and p.dim == 0 for p in placements) and len(placements) <= 1


def _sharded_dims(parameter: "DTensor") -> list[int]:
    """Return the dimensions of the mesh along which the ranks have different elements."""
    mesh = parameter.device_mesh
    return [dim for dim, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(dim) > 1]
