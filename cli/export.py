"""The command ``export``: the weights of a checkpoint, for use without Lightning."""

import json
import os
import shutil
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_muon.cli.errors.suggestions import nearest_path
from lightning_muon.strategies import SavedWeights, find_ties, read_weights
from lightning_muon.strategies.atomic import remove_all, write_file

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("safetensors", "pt", "huggingface")

_BUILDER = "lightning_muon.cli.models.hugging_face"
# What says how a tokenizer of Hugging Face works, beside tokenizer.json.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("checkpoint", help="a checkpoint: a file, or a sharded folder")
    parser.add_argument("out", type=Path, help="the file or folder to write; nothing is overwritten")
    formats = "safetensors, pt (a state dict of torch) or huggingface (a folder); default: by the ending of OUT"
    parser.add_argument("--format", choices=FORMATS, help=formats)
    raw = "the weights as they were trained, where the checkpoint has averages (EMA) too, which are the default"
    parser.add_argument("--raw", action="store_true", help=raw)
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights; default: as they are")


def export(given: Namespace) -> str:
    """Write the weights of a checkpoint.

    Args:
        given: The arguments of :func:`add_arguments`.

    Returns:
        A line that says what was written.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        FileExistsError: If there is something at the path to write to.
        ModuleNotFoundError: If the format needs a package that is not installed.
        ValueError: If it is no checkpoint, damaged, or its network does not have this format.
    """
    out: Path = given.out
    kind = given.format or {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", "": "huggingface"}.get(out.suffix)
    if kind is None:
        raise ValueError(f"'{out}': give a name that ends with .safetensors or .pt, or the name of a folder")
    for path in (out, out.with_suffix(".json")) if kind == "pt" else (out,):
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"'{path}' exists already: give another name")
    if not Path(given.checkpoint).exists():
        raise FileNotFoundError(f"'{given.checkpoint}' does not exist{nearest_path(given.checkpoint, '*.ckpt')}")
    saved = read_weights(given.checkpoint, raw=given.raw)
    write: Callable[[SavedWeights, Mapping[str, Any], Path], None] = {
        "safetensors": _write_safetensors,
        "pt": _write_torch,
        "huggingface": _write_hugging_face,
    }[kind]
    ties = find_ties({name: value for name, value in saved.tensors.items() if isinstance(value, Tensor)})
    tensors = {name: _converted(value, given.dtype) for name, value in saved.tensors.items() if name not in ties}
    tensors |= {name: tensors[other] for name, other in ties.items()}
    write(saved, {name: tensors[name] for name in saved.tensors}, out)
    count = sum(value.numel() for name, value in tensors.items() if isinstance(value, Tensor) and name not in ties)
    what = {None: "", True: ", averages", False: ", as trained"}[saved.averaged]
    left_out = f"; without {', '.join(saved.left_out[:3])}" if saved.left_out else ""
    return f"{kind}: {out} ({count:,} parameters and buffers{what}{left_out})"


def _converted(value: Any, dtype: str | None) -> Any:
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(getattr(torch, dtype))


def _write_safetensors(saved: SavedWeights, tensors: Mapping[str, Any], out: Path) -> None:
    from safetensors import SafetensorError  # noqa: PLC0415 - the other formats do without it
    from safetensors.torch import save_file  # noqa: PLC0415

    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{others[0]} is no tensor, and safetensors has only these: take --format pt")
    ties = find_ties(tensors)
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        if name not in ties:
            # Views of one storage are copied: the format has no views.
            storage = value.untyped_storage().data_ptr()
            own[name] = value.clone() if storage in storages else value.contiguous()
            storages.add(storage)
    # Of a tied weight, what save_model of safetensors writes: its name, with the one that is there.
    metadata = {**ties, "format": "pt", "description": json.dumps(saved.description)}
    try:
        _in_place(out, lambda path: save_file(own, path, metadata))
    except SafetensorError as error:
        raise OSError(f"'{out}' cannot be written: {error}") from error


def _write_torch(saved: SavedWeights, tensors: Mapping[str, Any], out: Path) -> None:
    beside = out.with_suffix(".json")
    description = json.dumps(saved.description, indent=1)
    write_file(beside, lambda stream: stream.write(f"{description}\n".encode()))
    try:
        write_file(out, partial(torch.save, dict(tensors)))
    except BaseException:
        beside.unlink()
        raise


def _write_hugging_face(saved: SavedWeights, tensors: Mapping[str, Any], out: Path) -> None:
    model = _meta_model(saved)
    expected = {name: value for name, value in model.state_dict().items() if name not in tensors}
    if expected or tensors.keys() - model.state_dict().keys():
        raise ValueError(f"the weights are not those of {type(model).__name__}, such as {min(expected or tensors)}")
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = next(value.dtype for value in tensors.values() if value.is_floating_point())
    _in_place(out, model.save_pretrained, folder=True)
    tokenizer = saved.data.get("tokenizer")
    place = Path(str(tokenizer)) if tokenizer not in (None, "bytes") else None
    folder = place if place is None or place.is_dir() else place.parent
    for name in _TOKENIZER_FILES if folder else ():
        if (cast("Path", folder) / name).is_file():
            shutil.copyfile(cast("Path", folder) / name, out / name)


def _meta_model(saved: SavedWeights) -> Any:
    """Build a model of transformers without weights; nothing else that a checkpoint may name is called."""
    from lightning_muon.cli.models import hugging_face, without_weights  # noqa: PLC0415 - few exports need it

    path, arguments = saved.network.get("class_path"), dict(saved.network.get("init_args") or {})
    if path != _BUILDER:
        network = f"its network is {path}" if path else "what its network is, it does not say"
        raise ValueError(
            f"the format huggingface is for networks of transformers, built by {_BUILDER}; {network}: take safetensors"
        )
    with without_weights():
        model: Any = hugging_face(**arguments)
    if "use_cache" not in (arguments.get("overrides") or {}) and hasattr(model.config, "use_cache"):
        model.config.use_cache = type(model.config)().use_cache  # it is off in training only
    return model


def _in_place(out: Path, write: Callable[[Path], None], *, folder: bool = False) -> None:
    """Let a function write a file or a folder under a hidden name, and rename it when it is complete."""
    unfinished = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.saving")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors makes files that only their owner may read
        if folder:
            unfinished.unlink()
        write(unfinished)
        for file in unfinished.iterdir() if folder else (unfinished,):
            file.chmod(mode)
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        unfinished.rename(out)
    except BaseException:
        remove_all(unfinished)
        raise
