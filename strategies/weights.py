"""The weights in a checkpoint or a file of weights, by the names of the network; read without running code.

Checkpoints have more than the network: optimizer states, progress, and maybe averages beside the trained weights. The
hyperparameters say which argument of the module is the network, such as ``net``, and how to build it again.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from lightning_muon.optim.routing.wrapped_names import plain_name
from lightning_muon.strategies.atomic import restore
from lightning_muon.strategies.averages import TRAINED_WEIGHTS
from lightning_muon.strategies.checkpoint_folder import find_whole, read_checkpoint_folder
from lightning_muon.strategies.integrity import META, is_checkpoint_folder
from lightning_muon.strategies.metadata import not_plain

# Arguments of a module that say how it is trained.
_OF_TRAINING = ("optimizer", "lr_scheduler")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a network, and how to build it.

    Attributes:
        tensors: By the names that the network gives them, without those of wrappers.
        averaged: Whether they are averages; ``None`` if the checkpoint has no averages.
        argument: The argument of the module that is the network, such as ``net``; ``None`` if this is not known. The
            names are those of the module then.
        network: ``class_path`` and ``init_args`` of the network; empty if they are not known.
        module: Further arguments of the module, without its optimizer and schedule.
        data: Hyperparameters of the data module.
        left_out: Weights of the module that are not the network's.
    """

    tensors: dict[str, Any]
    averaged: bool | None = None
    argument: str | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    module: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def description(self) -> dict[str, Any]:
        """All but the weights, as plain values for JSON."""
        parts = {"argument": self.argument, **self.network, "module": self.module, "data": self.data}
        plain: dict[str, Any] = json.loads(json.dumps({key: part for key, part in parts.items() if part}, default=str))
        return plain


def read_weights(path: str | Path, *, raw: bool = False) -> SavedWeights:
    """Read the weights in any checkpoint, or file of weights.

    Args:
        path: A checkpoint of Lightning's, a file or a sharded folder; a ``.safetensors`` file; a state dict that
            ``torch.save`` wrote; or a folder that ``save_pretrained`` of Hugging Face wrote.
        raw: Of a checkpoint with averaged weights, take those that were trained, not their averages.

    Returns:
        The weights, in memory that is mapped to the file where this is possible.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If it is no such file or folder, or damaged.
        UnsafeCheckpointError: If it contains more than plain values.
    """
    path = Path(path)
    restore(path)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist")
    if path.is_file() or is_checkpoint_folder(path):
        find_whole(path)
    if is_checkpoint_folder(path):
        return _of_checkpoint(read_checkpoint_folder(path, optimizers=False, trained=raw), raw=raw)
    if path.is_dir():
        return _of_hugging_face(path)
    if zipfile.is_zipfile(path):
        return _of_torch(path, raw=raw)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    raise ValueError(f"'{path}' is neither a checkpoint nor a file of weights")


def find_ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of weights that are another one, each with the name of that.

    Tied weights are one tensor in a model. Some checkpoints hold a copy for each name: so matrices are tied too if they
    are equal in each bit, unless all their elements are one number.
    """
    first: dict[Any, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        key: tuple[Any, ...] = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.ndim >= 2 and tensor.numel():
            key = (tensor.dtype, tuple(tensor.shape), tuple(tensor[(0,) * (tensor.ndim - 1)][:16].tolist()))
        other = first.setdefault(key, name)
        if other == name or not tensor.numel():
            continue
        is_same = tensor.data_ptr() == tensors[other].data_ptr()
        if is_same or (torch.equal(tensor, tensors[other]) and bool((tensor != tensor.flatten()[0]).any())):
            ties[name] = other
    return ties


def _of_torch(path: Path, *, raw: bool) -> SavedWeights:
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except UnpicklingError as error:
        raise not_plain(path, error) from None
    except (RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"'{path}' is not a checkpoint of torch, or a damaged one") from error
    if isinstance(saved, Mapping) and isinstance(saved.get("state_dict"), Mapping):
        return _of_checkpoint(saved, raw=raw)
    if not isinstance(saved, Mapping) or not saved or not all(isinstance(value, Tensor) for value in saved.values()):
        holds = f"keys {', '.join(map(str, list(saved)[:5]))}" if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"'{path}' has no weights: no 'state_dict' and no tensors by name; it holds {holds}")
    beside = path.with_suffix(".json")
    description = _json(beside) if beside.is_file() else {}
    return _described(dict(saved), description)


def _of_checkpoint(checkpoint: Mapping[str, Any], *, raw: bool) -> SavedWeights:
    averaged = "averaging_state" in checkpoint or TRAINED_WEIGHTS in checkpoint
    part = TRAINED_WEIGHTS if raw and averaged else "state_dict"
    state = {plain_name(name): value for name, value in checkpoint[part].items()}
    hyperparameters = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    arguments = {key: value for key, value in hyperparameters.items() if not key.startswith("_")}
    networks = [
        key
        for key, value in arguments.items()
        if isinstance(value, Mapping) and "class_path" in value and any(name.startswith(f"{key}.") for name in state)
    ]
    data = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    facts: dict[str, Any] = {
        "averaged": not raw if averaged else None,
        "data": {key: value for key, value in data.items() if not key.startswith("_")},
    }
    if len(networks) != 1:
        others = {key: value for key, value in arguments.items() if key not in _OF_TRAINING}
        return SavedWeights(state, module=others, **facts)
    (argument,) = networks
    prefix = f"{argument}."
    return SavedWeights(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)},
        argument=argument,
        network=arguments[argument],
        module={key: value for key, value in arguments.items() if key not in {argument, *_OF_TRAINING}},
        left_out=tuple(name for name in state if not name.startswith(prefix)),
        **facts,
    )


def _of_safetensors(path: Path) -> SavedWeights:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - checkpoints are read without it

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a safetensors file, or a damaged one: {error}") from None
    # As safetensors.torch.save_model writes tied weights: the name that is left out, with the one that is there.
    tensors |= {name: tensors[other] for name, other in metadata.items() if other in tensors and name not in tensors}
    try:
        description = json.loads(metadata.get("description", "{}"))
    except ValueError:
        description = {}
    return _described(tensors, description)


def _of_hugging_face(folder: Path) -> SavedWeights:
    names = ["model.safetensors", "pytorch_model.bin"]
    if (folder / _INDEX).is_file():
        names = sorted(set(_json(folder / _INDEX).get("weight_map", {}).values()))
    elif not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"'{folder}' is neither a sharded checkpoint ({META} and .metadata) nor a model of Hugging Face"
            f" ({', '.join(names)})"
        )
    else:
        names = [next(name for name in names if (folder / name).is_file())]
    tensors: dict[str, Any] = {}
    for name in names:
        tensors |= read_weights(folder / name).tensors
    return SavedWeights(tensors)


def _described(tensors: dict[str, Any], description: Any) -> SavedWeights:
    told = description if isinstance(description, Mapping) else {}
    network = {key: told[key] for key in ("class_path", "init_args") if key in told}
    others = {key: told[key] for key in ("module", "data") if isinstance(told.get(key), Mapping)}
    named = {plain_name(name): value for name, value in tensors.items()}
    return SavedWeights(named, argument=told.get("argument"), network=network, **others)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}
