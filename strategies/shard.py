"""One tensor between its two forms: whole, and in shards."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut this rank's shard out of a whole tensor, without communication.

    Args:
        tensor: The whole tensor, alike on all ranks; or one that is sharded already.
        like: A tensor of the same shape; the result lies where it lies, as shards or whole.

    Returns:
        A new tensor of the dtype of ``tensor``, which shares no memory with it unless it was sharded already.
    """
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor.to(like.device)
    mesh, placements = like.device_mesh, like.placements
    local_shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
    local = tensor[tuple(slice(start, start + size) for start, size in zip(offset, local_shape, strict=True))]
    return DTensor.from_local(
        local.to(like.to_local().device, copy=True).contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def gather(value: Any, *, keep: bool) -> Any:
    """Make a sharded tensor whole, in the memory of the CPU. A collective: all ranks call it, in the same order.

    Args:
        value: A tensor, sharded or not, or anything else, which is returned as it is.
        keep: Whether this rank wants the result; the others get ``None`` and need no memory for it.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value
