"""Whether the bytes of a checkpoint are those that were saved.

One file is a zip archive with a CRC-32 of each record, which torch writes and does not check. A sharded checkpoint has
``checksums.json``, written last: the size and CRC-32 of each file, and the run, the step and the id of the save, which
torch's ``.metadata`` has too. Folders without it, of Lightning's own strategies or of earlier versions, must have all
files that their ``.metadata`` names, of the right length. CRC-32 finds damage; it is no protection against attackers.
"""

import errno
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lightning_muon.strategies.metadata import METADATA, UnsafeCheckpointError, read_metadata, save_id

META = "meta.pt"
CHECKSUMS = "checksums.json"

_BLOCK = 1 << 22  # bytes that are read at a time
_ZIP = b"PK\x03\x04"
_FOLDER = 0x10  # an attribute of a record
# What reading changed bytes may raise; also OSError, from an offset or a method of compression that was changed.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)

# Files that this process has found whole, by path, size and time: a run checks its checkpoint before it starts, and
# again when it loads it.
_known: set[tuple[Any, ...]] = set()


class DamagedCheckpointError(ValueError):
    """The bytes of a checkpoint are not those that were saved, or some are missing."""


def is_checkpoint_folder(path: Path) -> bool:
    """Return whether a path is a sharded checkpoint."""
    return (path / META).is_file() and (path / METADATA).is_file()


def check_whole(path: Path) -> None:
    """Check that a checkpoint, a file or a folder, has the bytes that were saved.

    It reads all of them once, in blocks. What is not in torch's zip format is not checked.

    Raises:
        DamagedCheckpointError: In one line: which file, what is wrong, and what else could be loaded.
        UnsafeCheckpointError: If ``.metadata`` of a folder could run code.
    """
    raise_damage(path, damage_of(path))


def raise_damage(path: Path, damage: str | None) -> None:
    """Raise the error for a damage that :func:`damage_of` found, if it did."""
    if damage is not None:
        other = newest_whole_beside(path)
        remedy = f"use '{other}', the newest whole one beside it" if other else "there is no whole one beside it"
        raise DamagedCheckpointError(f"the checkpoint '{path}' is damaged: {damage}; {remedy}")


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint has the bytes that were saved, and in a folder being written, all of them."""
    if path.is_dir() and path.name.endswith(".saving") and not (path / CHECKSUMS).is_file():
        return False
    try:
        return damage_of(path) is None
    except (UnsafeCheckpointError, OSError):
        return False


def damage_of(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, ``None`` if it is whole.

    Args:
        path: A file or a folder.
        share: Of the files of a folder, each ``shares``-th is read from this one on: each rank of a group reads a part.
            The names, lengths and the metadata of all are compared anyway.
        shares: Number of parts; 0 reads none.
    """
    if path.is_dir():
        return _damage_of_folder(path, share, shares)
    if not path.is_file():
        return "it does not exist"
    if (signature := _signature(path)) in _known:
        return None
    damage = _damage_of_file(path)
    if damage is None:
        _known.add(signature)
    return damage


def newest_whole_beside(path: Path) -> Path | None:
    """Return the newest other checkpoint in the same folder that is whole."""
    found = []
    for other in path.parent.glob("*.ckpt"):
        if other.name != path.name and (is_checkpoint_folder(other) or _is_zip(other)):
            found.append(((other / META if other.is_dir() else other).stat().st_mtime_ns, other))
    return next((other for _, other in sorted(found, reverse=True) if is_whole(other)), None)


def checksums_text(sums: Mapping[str, tuple[int, int]], facts: Mapping[str, Any]) -> str:
    """Return the content of ``checksums.json``.

    Args:
        sums: Size and CRC-32 by the name of the file.
        facts: The run, the step and the id of the save, as ``save_id``.
    """
    files = {name: {"size": size, "crc32": f"{crc32:08x}"} for name, (size, crc32) in sorted(sums.items())}
    return json.dumps({**facts, "files": files}, indent=1) + "\n"


def _signature(path: Path) -> tuple[Any, ...]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino


def _is_zip(path: Path) -> bool:
    """Return whether a file ends as a zip archive does, changed or not."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _damage_of_file(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    if not start:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.external_attr & _FOLDER:
                    return f"its bytes have changed ({record.filename} is marked as a folder)"  # torch reads nothing
                if record.file_size and not record.CRC:
                    continue  # saved with torch.serialization.set_crc32_options(False)
                with archive.open(record) as stream:
                    while stream.read(_BLOCK):
                        pass
        if start == _ZIP:
            torch._C.PyTorchFileReader(str(path))  # which reads fields that Python does not
    except _BROKEN_ZIP as error:
        if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}:
            raise  # the disk
        if start != _ZIP and not _is_zip(path):
            return None  # not in the format of torch 1.6 and later
        if not _is_zip(path):
            return "its end is missing"
        return f"its bytes have changed ({error})"
    return None if start == _ZIP else "its first bytes have changed"


def _damage_of_folder(folder: Path, share: int, shares: int) -> str | None:
    for name in (META, METADATA):
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not (folder / CHECKSUMS).is_file():
        return _damage_of_earlier_folder(folder)
    try:
        saved = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        sums = {name: (int(entry["size"]), int(entry["crc32"], 16)) for name, entry in saved["files"].items()}
        identity = saved["save_id"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    for name, (size, _) in sums.items():
        if Path(name).name != name or not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes and not {size}: it is torn, or of another save"
    for name in sorted(sums)[share::shares] if shares else ():
        if (signature := _signature(folder / name)) not in _known:
            if _crc32(folder / name) != sums[name][1]:
                return f"{name} has other bytes than when it was saved, or is of another save"
            _known.add(signature)
    return _damage_of_metadata(folder, identity, set(sums))


def _damage_of_earlier_folder(folder: Path) -> str | None:
    return _damage_of_file(folder / META) or _damage_of_metadata(folder, None, None)


def _damage_of_metadata(folder: Path, identity: str | None, files: set[str] | None) -> str | None:
    try:
        metadata = read_metadata(folder)
    except UnpicklingError:
        return f"{METADATA} cannot be read"
    if identity is not None and save_id(metadata) != identity:
        return f"{METADATA} is of the save '{save_id(metadata)}', the other files are of '{identity}'"
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        if not (folder / name).is_file() or (files is not None and name not in files):
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) < end:
            return f"{name} has {size} bytes and not {end}: it is torn, or of another save"
    return None


def _crc32(path: Path) -> int:
    crc32 = 0
    block = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            crc32 = zlib.crc32(memoryview(block)[:count], crc32)
    return crc32
