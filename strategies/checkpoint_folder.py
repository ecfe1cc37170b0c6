"""Sharded checkpoints: a folder to which each rank writes its shards, and one file for everything that is no tensor.

The tensors are in torch's distributed checkpoint format (``.metadata`` and ``*.distcp``). The rest is in ``meta.pt``,
as in the sharded checkpoints of Lightning's own strategies. ``checksums.json`` says which bytes belong together.
"""

import io
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_muon.strategies.atomic import restore, write_file
from lightning_muon.strategies.averages import TRAINED_WEIGHTS, parts_with_weights
from lightning_muon.strategies.folder_writer import first_failure, write_folder
from lightning_muon.strategies.integrity import (
    META,
    check_whole,
    damage_of,
    is_checkpoint_folder,
    raise_damage,
)
from lightning_muon.strategies.metadata import (
    PlainLoadPlanner,
    PlainReader,
    UnsafeCheckpointError,
    not_plain,
    read_metadata,
)
from lightning_muon.strategies.optimizer_state import numbered

# The part that holds the weights: here and under Lightning's ModelParallelStrategy; under its FSDPStrategy.
_WEIGHTS = ("state_dict", "model")


def write_checkpoint_folder(
    checkpoint: Mapping[str, Any], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint of sharded tensors; see :func:`~lightning_muon.strategies.folder_writer.write_folder`.

    Args:
        checkpoint: A checkpoint of Lightning's, with optimizer states by the names of their parameters.
        folder: An earlier checkpoint of this name is replaced when this one is complete.
        group: All ranks; by default the default group.
    """
    write_folder(folder, *split_checkpoint(checkpoint), group)


def split_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a checkpoint, with states by names, into the tensors that ranks share out, and the rest."""
    tensors: dict[str, Any] = {}
    rest = dict(checkpoint)
    for part in parts_with_weights(checkpoint):
        tensors[part], rest[part] = _split(checkpoint[part])
    if "optimizer_states" in checkpoint:
        states = [_split(state) for state in checkpoint["optimizer_states"]]
        tensors |= {f"optimizer_{number}": sharded for number, (sharded, _) in enumerate(states) if sharded}
        rest["optimizer_states"] = [others for _, others in states]
    return tensors, rest


def read_checkpoint_folder(
    folder: Path,
    weights: Mapping[str, Any] | None = None,
    *,
    optimizers: bool = True,
    trained: bool | None = None,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Read a checkpoint that any number of ranks wrote; it must have been checked.

    Args:
        folder: Written by :func:`write_checkpoint_folder` or by one of Lightning's own sharding strategies.
        weights: The state dict of the model. Each weight, and each part of the optimizer state, is then read with the
            sharding that the model has under this name; a collective. Without it, this process reads full tensors.
        optimizers: Whether to read the states of the optimizers.
        trained: Whether to read the trained weights where ``state_dict`` has averages; default: with the optimizers.
        weights_only: Whether to refuse what is more than plain values. ``None`` refuses it. ``.metadata`` may never
            hold more than torch's own metadata.

    Returns:
        The checkpoint, with optimizer states by the names of their parameters.

    Raises:
        UnsafeCheckpointError: If there is more than plain values.
    """
    metadata = read_metadata(folder)
    wanted = {*_WEIGHTS, *((TRAINED_WEIGHTS,) if trained else ())}
    parts: dict[str, Any] = {}
    # The path of a tensor is (state_dict, name), or (optimizer_0, state, name, key).
    for name, path in metadata.planner_data.items():
        if optimizers or path[0] in wanted:
            is_weight = path[0] in {*_WEIGHTS, TRAINED_WEIGHTS}
            like = None if weights is None else weights.get(path[1] if is_weight else path[2])
            inner = parts
            for key in path[:-1]:
                inner = inner.setdefault(str(key), {})
            inner[str(path[-1])] = _allocated(metadata.state_dict_metadata[name], like)
    reader, planner = PlainReader(folder), PlainLoadPlanner(weights_only)
    try:
        with warnings.catch_warnings():
            # In a single process torch warns that nothing is distributed.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(parts, storage_reader=reader, planner=planner, no_dist=weights is None)
        checkpoint: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=weights_only)
    except CheckpointException as error:
        failure = first_failure(error)
        raise (not_plain(folder, failure) if isinstance(failure, UnpicklingError) else failure) from None
    except UnpicklingError as error:
        raise not_plain(folder / META, error) from None
    checkpoint.pop("save_id", None)
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


def check_plain(path: Path) -> None:
    """Refuse a checkpoint, file or folder, that contains more than plain values, before Lightning loads it with code.

    Raises:
        UnsafeCheckpointError: If it does.
    """
    try:
        torch.load(path / META if path.is_dir() else path, map_location="cpu", mmap=True, weights_only=True)
        metadata = read_metadata(path) if path.is_dir() else Metadata({})
        for index, info in (metadata.storage_data or {}).items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                with (path / info.relative_path).open("rb") as file:
                    file.seek(info.offset)
                    torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
    except UnpicklingError as error:
        raise not_plain(path, error) from None


def find_whole(path: Path, *, quick: bool = False) -> None:
    """Restore a checkpoint that a killed save has left under another name, and check its bytes. Not a collective.

    Args:
        path: A file or a folder.
        quick: Whether to compare only names, lengths and metadata of a folder: the ranks check the rest when they load.

    Raises:
        DamagedCheckpointError: If bytes have changed or are missing.
        UnsafeCheckpointError: If the ``.metadata`` of a folder could run code.
    """
    restore(path)
    if path.exists():
        raise_damage(path, damage_of(path, shares=0 if quick else 1))


def find_whole_together(path: Path) -> None:
    """Do what :func:`find_whole` does on all ranks; of a folder each of them reads a part. A collective."""
    rank, count = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        restore(path)
    dist.barrier()
    damage, error = None, None
    try:
        # A file is read by one rank.
        if path.is_dir() or (rank == 0 and path.exists()):
            damage = damage_of(path, rank, count)
    except (OSError, UnsafeCheckpointError) as found:
        error = found
    outcomes: list[Any] = [None] * count
    dist.all_gather_object(outcomes, (damage, error))
    for found_damage, found_error in outcomes:
        if found_error is not None:
            raise found_error
        raise_damage(path, found_damage)


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
        DamagedCheckpointError: If bytes of the folder have changed or are missing.
        UnsafeCheckpointError: If it contains more than plain values.
        SaveError: If the file cannot be written; nothing is left of it.
    """
    folder, file = Path(folder), Path(file)
    restore(folder)
    if not is_checkpoint_folder(folder):
        raise FileNotFoundError(f"'{folder}' is no sharded checkpoint: it has no meta.pt or no .metadata")
    if file.exists():
        raise FileExistsError(f"'{file}' exists already: give another name")
    check_whole(folder)
    checkpoint = read_checkpoint_folder(folder)
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = [numbered(state) for state in checkpoint["optimizer_states"]]
    write_file(file, partial(torch.save, checkpoint))


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
