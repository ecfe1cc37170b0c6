"""Sharded checkpoints: a folder to which each rank writes its shards, and one file for everything that is no tensor.

The tensors are in torch's distributed checkpoint format (``.metadata`` and ``*.distcp``). The rest is in ``meta.pt``,
as in the sharded checkpoints of Lightning's own strategies.
"""

import warnings
from collections.abc import Mapping
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

from lightning_muon.strategies.averages import TRAINED_WEIGHTS, parts_with_weights
from lightning_muon.strategies.optimizer_state import numbered

META = "meta.pt"

# The part that holds the weights: here and under Lightning's ModelParallelStrategy; under its FSDPStrategy.
_WEIGHTS = ("state_dict", "model")


def is_checkpoint_folder(path: Path) -> bool:
    """Return whether a path is a sharded checkpoint."""
    return (path / META).is_file() and (path / ".metadata").is_file()


def write_checkpoint_folder(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint of sharded tensors. A collective.

    Args:
        checkpoint: A checkpoint of Lightning's, with optimizer states by the names of their parameters.
        folder: Created if missing; an earlier checkpoint in it is replaced.
    """
    tensors: dict[str, Any] = {}
    rest = dict(checkpoint)
    for part in parts_with_weights(checkpoint):
        tensors[part], rest[part] = _split(checkpoint[part])
    if "optimizer_states" in checkpoint:
        states = [_split(state) for state in checkpoint["optimizer_states"]]
        tensors |= {f"optimizer_{number}": sharded for number, (sharded, _) in enumerate(states) if sharded}
        rest["optimizer_states"] = [others for _, others in states]
    # A tensor that is not sharded, such as the statistics of a batch norm, is saved from rank 0, as under DDP.
    save(tensors, checkpoint_id=folder, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    if dist.get_rank() == 0:
        torch.save(rest, folder / META)
    dist.barrier()


def read_checkpoint_folder(
    folder: Path,
    weights: Mapping[str, Any] | None = None,
    *,
    optimizers: bool = True,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Read a checkpoint that any number of ranks wrote.

    Args:
        folder: Written by :func:`write_checkpoint_folder` or by one of Lightning's own sharding strategies.
        weights: The state dict of the model. Each weight, and each part of the optimizer state, is then read with the
            sharding that the model has under this name; a collective. Without it, this process reads full tensors.
        optimizers: Whether to read the states of the optimizers.
        weights_only: Passed to ``torch.load``.

    Returns:
        The checkpoint, with optimizer states by the names of their parameters.
    """
    metadata = FileSystemReader(folder).read_metadata()
    parts: dict[str, Any] = {}
    # The path of a tensor is (state_dict, name), or (optimizer_0, state, name, key).
    for name, path in metadata.planner_data.items():
        if optimizers or path[0] in _WEIGHTS:
            is_weight = path[0] in {*_WEIGHTS, TRAINED_WEIGHTS}
            like = None if weights is None else weights.get(path[1] if is_weight else path[2])
            inner = parts
            for key in path[:-1]:
                inner = inner.setdefault(str(key), {})
            inner[str(path[-1])] = _allocated(metadata.state_dict_metadata[name], like)
    with warnings.catch_warnings():
        # In a single process torch warns that nothing is distributed.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(parts, checkpoint_id=folder, no_dist=weights is None)

    checkpoint: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=weights_only)
    _merge(checkpoint.setdefault("state_dict", {}), next((parts[name] for name in _WEIGHTS if name in parts), {}))
    if TRAINED_WEIGHTS in parts:
        _merge(checkpoint.setdefault(TRAINED_WEIGHTS, {}), parts[TRAINED_WEIGHTS])
    count = sum(name.startswith("optimizer_") for name in parts)
    if count:
        states = checkpoint.setdefault("optimizer_states", [{} for _ in range(count)])
        for number, state in enumerate(states):
            _merge(state, parts.get(f"optimizer_{number}", {}))
            state["param_groups"] = _with_lists(state["param_groups"])
    return checkpoint


def consolidate_checkpoint(folder: str | Path, file: str | Path) -> None:
    """Convert a sharded checkpoint to one file, in one process and without a GPU.

    The file has the same weights, optimizer states and progress, and the form that one device writes. It loads on one
    device, under DDP and under fsdp2.

    Args:
        folder: The sharded checkpoint.
        file: The file to write; it must not exist.

    Raises:
        FileNotFoundError: If the folder is not a sharded checkpoint.
        FileExistsError: If ``file`` exists.
    """
    folder, file = Path(folder), Path(file)
    if not is_checkpoint_folder(folder):
        raise FileNotFoundError(f"'{folder}' is no sharded checkpoint: it has no meta.pt or no .metadata")
    if file.exists():
        raise FileExistsError(f"'{file}' exists already: give another name")
    checkpoint = read_checkpoint_folder(folder)
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = [numbered(state) for state in checkpoint["optimizer_states"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, file)


def _split(tree: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Split nested dicts into the tensors, without empty dicts, and the rest."""
    tensors, rest = dict[Any, Any](), dict[Any, Any]()
    for key, value in tree.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, Mapping):
            inner, rest[key] = _split(value)
            if inner:
                tensors[key] = inner
        else:
            rest[key] = value
    return tensors, rest


def _merge(tree: dict[Any, Any], other: Mapping[Any, Any]) -> None:
    """Add the leaves of nested dicts to other nested dicts, in place."""
    for key, value in other.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _with_lists(tree: Any) -> Any:
    """Turn each dict with the keys "0", "1", … into a list: the distributed format stores lists of dicts like this."""
    if not isinstance(tree, Mapping):
        return tree
    if tree and all(key == str(number) for number, key in enumerate(tree)):
        return [_with_lists(value) for value in tree.values()]
    return {key: _with_lists(value) for key, value in tree.items()}


def _allocated(entry: TensorStorageMetadata | BytesStorageMetadata, like: Any) -> Tensor | None:
    """Allocate a tensor to read into: sharded like the model's, if this has the saved shape, else a full one."""
    if isinstance(entry, BytesStorageMetadata):
        return None
    if isinstance(like, Tensor) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
