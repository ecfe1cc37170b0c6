"""What a DTensor says about where it lives."""

import math
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

from lightning_muon.optim.sharding.sharding import Sharding, chunks, replicated

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Tell whether a tensor is a DTensor, without importing what makes them: it takes seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: a view, so that what is written there is written to the tensor."""
    if not is_dtensor(tensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local


def local_gradient(parameter: Tensor, gradient: Tensor, name: str) -> Tensor:
    """Return this rank's part of the gradient of a parameter.

    Raises:
        ValueError: If the gradient is laid out in another way than the parameter.
    """
    if is_dtensor(parameter) and (not is_dtensor(gradient) or gradient.placements != parameter.placements):
        found = gradient.placements if is_dtensor(gradient) else "a plain tensor"
        raise ValueError(
            f"{name} is placed as {parameter.placements}, but its gradient is {found}:"
            " redistribute the gradient before the step"
        )
    return local_tensor(gradient)


def laid_out_as(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor in the layout of a parameter, if this is a DTensor of its shape. No communication.

    Args:
        value: The same on all ranks, such as the state in a checkpoint of one device.
        parameter: The parameter.
    """
    if not is_dtensor(parameter) or is_dtensor(value) or value.shape != parameter.shape or value.ndim == 0:
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - it takes seconds, and is there already

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def dtensor_sharding(parameter: "DTensor") -> Sharding | None:
    """Describe a DTensor whose rows are sharded over one dimension of its mesh, and copied along the others.

    Copies (the replicas of HSDP) are updated by the same work, done once in each replica: that is deterministic, so
    they stay equal, and nothing has to be sent between them.

    Args:
        parameter: One of which :func:`is_sharded_by_rows` is true.

    Returns:
        The sharding over the group of ranks that together hold the parameter; None where this rank alone does.
    """
    mesh = parameter.device_mesh
    spread = _spread_dims(parameter)
    if not spread:
        return replicated(parameter.shape, mesh.get_group()) if mesh.ndim == 1 else None
    group = mesh.get_group(spread[0])
    row = math.prod(parameter.shape[1:])
    held = tuple((start * row, stop * row) for start, stop in chunks(parameter.shape[0], group.size()))
    return Sharding(parameter.shape, group, held)


def is_sharded_by_rows(parameter: "DTensor") -> bool:
    """Tell whether each rank holds one range of rows, or all: not so for the column shards of tensor parallelism."""
    placements: list[Any] = [parameter.placements[dim] for dim in _spread_dims(parameter)]
    # The exact class: a strided shard is one too, but its rows are not in their order.
    return all(type(p).__name__ == "Shard" and p.dim == 0 for p in placements) and len(placements) <= 1


def _spread_dims(parameter: "DTensor") -> list[int]:
    """Return the dimensions of the mesh along which ranks hold something different."""
    mesh = parameter.device_mesh
    return [dim for dim, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(dim) > 1]
