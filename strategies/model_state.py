"""Loading weights into a sharded model: all of them, or none."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_muon.strategies.shard import shard_like


def load_model_state(model: nn.Module, saved: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load a state dict of whole or sharded tensors.

    Args:
        model: The model, of sharded parameters or not.
        saved: What its ``state_dict()`` was when it was saved.
        strict: Whether names that only one of them has are an error.

    Raises:
        ValueError: If names or shapes differ, with all of these names. The model remains as it was.
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
