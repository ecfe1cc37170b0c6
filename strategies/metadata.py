"""Reading the parts of a sharded checkpoint without running code that they may contain.

Torch reads ``.metadata`` with plain pickle, and the values that are no tensors with ``weights_only=False``: both call
whatever function the bytes name. Here ``.metadata`` may name torch's metadata classes only, and values are weights-only
unless the user says otherwise.
"""

import io
import pickle
import re
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import metadata as earlier
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as current
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

METADATA = ".metadata"
# What unpickling changed bytes may raise, beside UnpicklingError.
_DAMAGE = (EOFError, AttributeError, IndexError, KeyError, MemoryError, OverflowError, TypeError, ValueError)


class UnsafeCheckpointError(ValueError):
    """A checkpoint contains more than plain values, so that loading it could run code."""


def _member(enum: type[Enum], name: str) -> Enum:
    """Return a member of an enum; some versions of Python pickle it as a call of ``getattr``."""
    if not (isinstance(enum, type) and issubclass(enum, Enum)):
        raise UnpicklingError("getattr")
    return enum[name]


_MODULES = {module.__name__: module for module in (current, earlier, filesystem)}
_CLASSES = {
    current.__name__: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    earlier.__name__: {"TensorProperties", "MEM_FORMAT_ENCODING"},  # before torch 2.3
    filesystem.__name__: {"_StorageInfo"},
}
_OTHERS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("builtins", "getattr"): _member,
    ("collections", "OrderedDict"): dict,
} | {
    # Where it was saved; a path of another system can be read this way too.
    (module, f"{pure}{system}Path"): PurePosixPath if system == "Posix" else PureWindowsPath
    for module in ("pathlib", "pathlib._local")
    for pure in ("", "Pure")
    for system in ("Posix", "Windows")
}


class _MetadataUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OTHERS:
            return _OTHERS[module, name]
        if name in _CLASSES.get(module, ()):
            return getattr(_MODULES[module], name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(f"{module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """Read ``.metadata``, which says what is where in a sharded checkpoint.

    Raises:
        UnsafeCheckpointError: If it names anything but torch's metadata classes.
        UnpicklingError: If it is damaged.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        # Also whether it has what will be read from it.
        files = [
            info.relative_path
            for index, info in (metadata.storage_data or {}).items()
            if metadata.state_dict_metadata[index.fqn] is not None and info.offset + info.length >= 0
        ]
        outside = next((name for name in files if Path(name).name != name), None)
    except UnsafeCheckpointError as error:
        outside = error
    except _DAMAGE as error:
        raise UnpicklingError(f"{type(error).__name__}: {error}") from error
    if outside is not None:
        raise UnsafeCheckpointError(
            f"'{folder}' is not loaded: its {METADATA} names {outside}, which is no part of a checkpoint; use a"
            " checkpoint that you know"
        )
    return metadata


def not_plain(path: Path, error: UnpicklingError) -> ValueError:
    """Return the error, in one line, of a checkpoint that ``torch.load`` refuses to load weights-only."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        return ValueError(f"'{path}' is not a checkpoint of torch, or a damaged one")
    return UnsafeCheckpointError(
        f"'{path}' is not loaded: it contains {found[1]}, which is no plain value, and loading it could run code; if"
        " you trust who made it, load it with weights_only=False (--weights_only false)"
    )


def save_id(metadata: Metadata) -> str | None:
    """Return the id that torch gives to a save; ``None`` for older checkpoints."""
    meta = getattr(metadata, "storage_meta", None)
    return None if meta is None else meta.save_id


class PlainReader(FileSystemReader):
    """Torch's reader of a folder, with a ``.metadata`` that cannot run code."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        meta.load_id = self.load_id
        metadata.storage_meta = meta
        return metadata


class PlainLoadPlanner(DefaultLoadPlanner):
    """Torch's planner, with weights-only values where there are no tensors.

    Args:
        weights_only: Passed to ``torch.load``; ``None`` is ``True``.
    """

    def __init__(self, weights_only: bool | None = None) -> None:
        super().__init__()
        self.weights_only = weights_only is None or weights_only

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        if self.weights_only:
            torch.load(value, weights_only=True)  # what it accepts runs no code below either
            value.seek(0)
        super().load_bytes(read_item, value)
