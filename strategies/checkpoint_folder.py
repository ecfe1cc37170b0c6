"""Sharded checkpoints: a folder into which each rank writes its shards, and one file for what is not a tensor.

The tensors are in torch's distributed checkpoint format (``.metadata`` and ``*.distcp``), the rest is in ``meta.pt``,
where Lightning has it too.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

META = "meta.pt"

# Here, and under Lightning's ModelParallelStrategy; under its FSDPStrategy.
_WEIGHTS = ("state_dict", "model")

Keys = tuple[Any, ...]
"""Where a tensor is: ``("state_dict", name)``, or ``("optimizer_0", "state", name, key)``."""


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a sharded checkpoint lies there."""
    return (path / META).is_file() and (path / ".metadata").is_file()


def write_checkpoint_folder(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint of sharded tensors. A collective.

    Args:
        checkpoint: As Lightning dumps it, with optimizer states by the names of their parameters.
        folder: Made where it is missing; an earlier checkpoint in it is replaced.
    """
    tensors: dict[str, Any] = {}
    for keys, tensor in _tensors(_sharded_parts(checkpoint)):
        _put(tensors, keys, tensor)
    # Of what is not sharded, such as the statistics of a batch norm, rank 0's is saved, as under DDP.
    save(tensors, checkpoint_id=folder, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    if dist.get_rank() == 0:
        torch.save(_without_tensors(checkpoint), folder / META)
    dist.barrier()


def read_checkpoint_folder(
    folder: Path,
    weights: Mapping[str, Any] | None = None,
    *,
    optimizers: bool = True,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Read a checkpoint, whatever number of ranks wrote it.

    Args:
        folder: What :func:`write_checkpoint_folder` wrote, or one of Lightning's own sharding strategies.
        weights: The state dict of the model: each tensor is read in shards like those that the model has under its
            name, optimizer states included; a collective. Without it all are read whole, by this process alone.
        optimizers: Whether to read the states of the optimizers.
        weights_only: Passed on to ``torch.load``.

    Returns:
        The checkpoint, with optimizer states by the names of their parameters.
    """
    metadata = FileSystemReader(folder).read_metadata()
    parts: dict[str, Any] = {}
    for name, keys in metadata.planner_data.items():
        if optimizers or not keys[0].startswith("optimizer_"):
            like = None if weights is None else weights.get(keys[1] if keys[0] in _WEIGHTS else keys[2])
            _put(parts, tuple(map(str, keys)), _allocated(metadata.state_dict_metadata[name], like))
    with warnings.catch_warnings():
        # Without other processes torch warns that there are none.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(parts, checkpoint_id=folder, no_dist=weights is None)

    checkpoint: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=weights_only)
    _merge(checkpoint.setdefault("state_dict", {}), next((parts[name] for name in _WEIGHTS if name in parts), {}))
    count = sum(name.startswith("optimizer_") for name in parts)
    if count:
        states = checkpoint.setdefault("optimizer_states", [{} for _ in range(count)])
        for number, state in enumerate(states):
            _merge(state, parts.get(f"optimizer_{number}", {}))
            state["param_groups"] = _lists(state["param_groups"])
    return checkpoint


def _sharded_parts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint that hold the model's tensors, by the names that they have in the folder."""
    states = checkpoint.get("optimizer_states", ())
    return {"state_dict": checkpoint["state_dict"], **{f"optimizer_{i}": state for i, state in enumerate(states)}}


def _without_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint without the tensors of those parts."""
    rest = {**checkpoint, "state_dict": _others(checkpoint["state_dict"])}
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = [_others(state) for state in checkpoint["optimizer_states"]]
    return rest


def _tensors(tree: Mapping[Any, Any], keys: Keys = ()) -> Iterator[tuple[Keys, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield (*keys, key), value
        elif isinstance(value, Mapping):
            yield from _tensors(value, (*keys, key))


def _others(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        key: _others(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if not isinstance(value, Tensor)
    }


def _put(tree: dict[Any, Any], keys: Keys, value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def _merge(tree: dict[Any, Any], other: Mapping[Any, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _lists(tree: Any) -> Any:
    """Nested dicts with lists in place of dicts with keys from "0", as the distributed format has lists of dicts."""
    if not isinstance(tree, Mapping):
        return tree
    if tree and all(key == str(number) for number, key in enumerate(tree)):
        return [_lists(value) for value in tree.values()]
    return {key: _lists(value) for key, value in tree.items()}


def _allocated(entry: TensorStorageMetadata | BytesStorageMetadata, like: Any) -> Tensor | None:
    """Memory for a saved tensor: sharded as the model's of this name, where it has the same shape, else whole."""
    if isinstance(entry, BytesStorageMetadata):
        return None
    if isinstance(like, Tensor) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
