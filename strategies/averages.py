"""Averaged weights under sharding: Lightning's ``WeightAveraging`` and ``EMAWeightAveraging``.

The callbacks copy the model before it is sharded, and then compute with both, parameter by parameter. So the copy gets
the shards of the model: its average is computed on each rank for the rank's own shards.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, device, nn
from torch.optim.swa_utils import AveragedModel

from lightning_muon.strategies.model_state import gather, shard_like

# Where WeightAveraging saves the weights that are trained, while the averaged ones are the checkpoint's `state_dict`.
TRAINED_WEIGHTS = "current_model_state"


def check_callbacks(trainer: Trainer) -> None:
    """Raise a MisconfigurationException if a callback averages weights in a way that shards do not have."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise MisconfigurationException(
                "StochasticWeightAveraging does not work with fsdp2: take lightning.pytorch.callbacks.WeightAveraging,"
                " which averages the same way, or EMAWeightAveraging"
            )


def averages_of(trainer: Trainer) -> list[AveragedModel]:
    """Return the averages that callbacks keep; there are none unless the trainer fits."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = (callback._average_model for callback in callbacks if isinstance(callback, WeightAveraging))
    return [average for average in found if average is not None]


def shard_averages(averages: Iterable[AveragedModel], model: nn.Module, root: device) -> None:
    """Replace the averages by copies of the model, sharded like it.

    Args:
        averages: Copies of the model that were made before it was sharded.
        model: The model, sharded.
        root: The device of this rank.
    """
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for average in averages:
        copies: dict[int, Any] = {}  # by the id of a tensor, which several modules may share
        for name, old in chain(average.module.named_parameters(), average.module.named_buffers()):
            copy = own[name].detach().clone()
            copies[id(old)] = nn.Parameter(copy, own[name].requires_grad) if isinstance(old, nn.Parameter) else copy
        for module in average.module.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({key: copies[id(old)] for key, old in tensors.items() if old is not None})
        average.n_averaged = average.n_averaged.to(root)


def laid_out(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a checkpoint whose weights, averaged and trained, are sharded like the model's. No communication."""
    own = model.state_dict()
    return {**checkpoint, **{part: dict(_sharded(checkpoint[part], own)) for part in parts_with_weights(checkpoint)}}


def gathered_averages(checkpoint: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """Return a checkpoint with whole averages, on the ranks that keep it. A collective."""
    state = {name: gather(value, keep=keep) for name, value in checkpoint["state_dict"].items()}
    return {**checkpoint, "state_dict": state if keep else {}}


def parts_with_weights(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the keys of a checkpoint under which it has weights of the model: averaged or not, and trained."""
    return [part for part in ("state_dict", TRAINED_WEIGHTS) if part in checkpoint]


def _sharded(state: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        like = own.get(name)
        if isinstance(value, Tensor) and isinstance(like, Tensor) and value.shape == like.shape:
            yield name, shard_like(value, like)
        else:
            yield name, value
