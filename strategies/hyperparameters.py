"""Hyperparameters in checkpoints: a module among them cannot be saved once it is sharded."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

_KEYS = (LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)


def without_modules(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a checkpoint without the modules among its hyperparameters, and the names of these.

    ``save_hyperparameters()`` takes every argument of ``__init__``, so also a network that is one. ``fully_shard``
    changes the classes of its modules to some that exist in this process only. The weights are in the checkpoint
    anyway.

    Args:
        checkpoint: A checkpoint of Lightning's; it is not changed.
    """
    dropped: list[str] = []
    kept = dict(checkpoint)
    for key in _KEYS:
        # What is not a plain dict is a container of OmegaConf, in which no module can be.
        if isinstance(saved := checkpoint.get(key), dict):
            kept[key] = _without_modules(saved, "", dropped)
    return kept, dropped


def _without_modules(tree: Mapping[Any, Any], path: str, dropped: list[str]) -> dict[Any, Any]:
    kept: dict[Any, Any] = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        if _is_or_lists_a_module(value):
            dropped.append(name)
        else:
            kept[key] = _without_modules(value, f"{name}.", dropped) if type(value) is dict else value
    return kept


def _is_or_lists_a_module(value: object) -> bool:
    if isinstance(value, (list, tuple, set)):
        return any(map(_is_or_lists_a_module, value))
    return isinstance(value, nn.Module)


def warn_of_modules(names: Sequence[str]) -> None:
    """Warn of hyperparameters that :func:`without_modules` has left out."""
    rank_zero_warn(
        f"checkpoints do not contain the hyperparameters {', '.join(names)}: they are modules, which cannot be saved"
        " once they are sharded. Their weights are saved. Give them to load_from_checkpoint, or leave them out:"
        f" save_hyperparameters(ignore={[name.partition('.')[0] for name in names]})"
    )
