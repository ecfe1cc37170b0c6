"""The weights of a model: one tensor sharded or gathered, and a whole state dict loaded."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def load_model_state(model: nn.Module, saved: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load a state dict of full or sharded tensors into a model, sharded or not.

    Args:
        model: The model.
        saved: The state dict, as ``model.state_dict()`` returned it when it was saved.
        strict: Whether a name that only one of them has is an error.

    Raises:
        ValueError: If names or shapes differ; the message lists them all, and the model is unchanged.
    """
    own = model.state_dict()
    problems = [
        f"{name} has the shape {tuple(value.shape)} in the checkpoint and {tuple(own[name].shape)} in the model"
        for name, value in saved.items()
        if isinstance(value, Tensor) and isinstance(own.get(name), Tensor) and value.shape != own[name].shape
    ]
    if strict:
        problems += [f"{name} is not in the checkpoint" for name in own if name not in saved]
        problems += [f"{name} is in the checkpoint only" for name in saved if name not in own]
    if problems:
        raise ValueError(f"the checkpoint is of another model than {type(model).__name__}: {'; '.join(problems)}")
    laid_out = {
        name: shard_like(value, own[name]) if isinstance(value, Tensor) and name in own else value
        for name, value in saved.items()
    }
    model.load_state_dict(laid_out, strict=strict)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor, without communication.

    Args:
        tensor: The full tensor, equal on all ranks; or one that is already sharded.
        like: A tensor of the same shape, whose device and placements the result takes.

    Returns:
        A tensor of the dtype of ``tensor``. A new shard is a copy and does not keep the full tensor alive.
    """
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor.to(like.device)
    mesh, placements = like.device_mesh, like.placements
    local_shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
    local = tensor[tuple(slice(start, start + size) for start, size in zip(offset, local_shape, strict=True))]
    local = local.to(like.to_local().device, copy=True).contiguous()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def gather(value: Any, *, keep: bool) -> Any:
    """Gather a sharded tensor on the CPU. A collective: all ranks call it, in the same order.

    Args:
        value: A tensor, sharded or not; anything else is returned as it is.
        keep: Whether this rank needs the result. The other ranks get ``None``.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value
