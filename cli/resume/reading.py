"""Read what a checkpoint says about its run, without its weights; whatever is no checkpoint of Lightning's is refused.

Files come from anywhere: other programs, half a download, another version. Each is told in one line what it is.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import torch
from torch import Tensor

from lightning_muon.cli.errors.suggestions import listed

_VERSION = "pytorch-lightning_version"
_TYPES: dict[str, type] = {
    "state_dict": Mapping,
    "hyper_parameters": Mapping,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "global_step": int,
    "epoch": int,
}


def is_url(ckpt_path: str) -> bool:
    """Return whether a path has a protocol, such as ``https://`` or ``s3://``."""
    return re.match(r"[A-Za-z][\w+.-]+://", ckpt_path) is not None


def check_reachable(url: str) -> None:
    """Refuse a URL under which there is nothing, before anything is made for the run.

    Raises:
        ValueError: With the reason. The URL is shown without what may be a secret in it: user, password and query.
    """
    from lightning.fabric.utilities.cloud_io import get_filesystem  # noqa: PLC0415 - few runs need it

    shown = _without_secrets(url)
    try:
        found = get_filesystem(url).exists(url)
    except Exception as error:  # any library may stand behind a protocol
        reason = str(error).replace(url, shown).splitlines() or [type(error).__name__]
        raise ValueError(f"--ckpt_path: '{shown}' cannot be reached: {reason[0]}") from error
    if not found:
        raise ValueError(f"--ckpt_path: '{shown}' cannot be reached, or does not exist")


def read_checkpoint(path: Path, *, fitting: bool = False, trusted: bool = False) -> Mapping[str, Any] | None:
    """Return a checkpoint, its tensors memory-mapped; of a sharded one, what is beside the shards.

    Args:
        path: A file, or the folder of a sharded checkpoint.
        fitting: Whether training is to go on from it.
        trusted: Whether the user allows it to run code when it is loaded.

    Returns:
        ``None`` if it holds more than plain values, and is trusted.

    Raises:
        ValueError: If it cannot be read, is not a checkpoint of Lightning's, or has no more than weights where
            ``fitting`` needs the rest.
    """
    file = path / "meta.pt" if path.is_dir() else path
    try:
        if path.is_dir() and not (file.is_file() and (path / ".metadata").is_file()):
            missing = " and ".join(name for name in ("meta.pt", ".metadata") if not (path / name).is_file())
            raise ValueError(f"--ckpt_path: '{path}' is not a checkpoint: the folder has no {missing}")
        checkpoint: Mapping[str, Any] | None = _load(file, path, trusted=trusted)
    except OSError as error:
        raise ValueError(f"--ckpt_path: '{path}' cannot be read: {error.strerror or error}") from error
    if checkpoint is not None:
        _check_content(checkpoint, path, fitting=fitting)
    return checkpoint


def _load(file: Path, path: Path, *, trusted: bool) -> Any:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"--ckpt_path: '{path}' is not a checkpoint{_what_else(file)}")
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except UnpicklingError as error:
        if trusted:
            return None
        found = re.search(r"(?:GLOBAL|class|type) ([\w.]+\.\w+)", str(error))
        raise ValueError(
            f"--ckpt_path: '{path}' holds more than plain values{f' ({found[1]})' if found else ''}, which could run"
            " code when they are loaded; if you trust it, add --weights_only false"
        ) from error
    except (RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"--ckpt_path: '{path}' is not a checkpoint, or is damaged") from error


def _what_else(file: Path) -> str:
    """Return a phrase about a file that is no zip archive, as those of ``torch.save`` are."""
    with file.open("rb") as stream:
        start = stream.read(16)
    if not start:
        return ": it is empty"
    if start.startswith(b"PK"):
        return ": its end is missing"
    if start.startswith(b"\x80"):
        return ": it is a pickle, such as torch saved before version 1.6; save it again by torch.save"
    if start[8:9] == b"{":
        return ": it is a safetensors file, of weights only"
    return ""


def _check_content(checkpoint: Any, path: Path, *, fitting: bool) -> None:
    sharded = path.is_dir()
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"--ckpt_path: '{path}' is not a checkpoint: it holds a {type(checkpoint).__name__}")
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(
            f"--ckpt_path: '{path}' holds weights only, not a checkpoint of Lightning: load it in the module, by"
            " self.load_state_dict(torch.load(…))"
        )
    if _VERSION not in checkpoint or not (sharded or "state_dict" in checkpoint):
        missing = "state_dict" if _VERSION in checkpoint else _VERSION
        holds = listed("; it holds", map(str, checkpoint), most=5)
        raise ValueError(f"--ckpt_path: '{path}' is not a checkpoint of Lightning: it has no '{missing}'{holds}")
    for key, kind in _TYPES.items():
        if checkpoint.get(key) is not None and not isinstance(checkpoint[key], kind):
            raise ValueError(f"--ckpt_path: '{path}' is damaged: its {key} is a {type(checkpoint[key]).__name__}")
    if fitting and not sharded and "optimizer_states" not in checkpoint:
        raise ValueError(
            f"--ckpt_path: '{path}' was saved without the optimizer (save_weights_only): training cannot go on from"
            " it; validate, test and predict can"
        )


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
