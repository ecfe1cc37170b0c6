"""Files and folders that get their final name only when they are complete and on the disk.

``last.ckpt`` is written as ``.last.ckpt.saving``, a sibling and so on the same file system, synced and renamed. A file
replaces another one in a single step. A folder cannot: the earlier one is first renamed to ``.last.ckpt.replaced``, and
removed when the new one is in place. So a kill leaves the earlier checkpoint or the new one under the final name, or,
between the two renames, both under these names: :func:`restore` then puts the newest whole one back.

A process that writes holds a lock on what it writes, which ends with the process. Without the lock it is a leftover.
"""

import contextlib
import io
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_muon.strategies.integrity import is_whole

try:
    import fcntl
except ImportError:  # on Windows: leftovers are named there, but not removed
    fcntl = None  # type: ignore[assignment]

_LEFTOVER = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?\.(saving|replaced)")


class SaveError(OSError):
    """A checkpoint could not be saved, for example because the disk is full; the one before it is unchanged."""


def saving_path(path: Path) -> Path:
    """Return where a folder lies while it is written."""
    return path.with_name(f".{path.name}.saving")


def replaced_path(path: Path) -> Path:
    """Return where an earlier file or folder lies while another one takes its place."""
    return path.with_name(f".{path.name}.replaced")


class SummedFile(io.FileIO):
    """A new file that computes the CRC-32 of what is written to it.

    Attributes:
        size: Bytes written.
        crc32: Their checksum.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "wb")
        self.size = self.crc32 = 0

    def write(self, data: Any) -> int:
        """Write bytes, or fewer of them, and return how many."""
        count = super().write(data)
        self.crc32 = zlib.crc32(memoryview(data).cast("B")[:count], self.crc32)
        self.size += count
        return count


class SyncedWriter(io.BufferedWriter):
    """A buffered file that is synced to the disk before it is closed.

    Attributes:
        error: What the file system refused. ``torch.save`` hides it behind an error of its own.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, and return how many."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise

    def close(self) -> None:
        """Write what is left, sync it, and close the file."""
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()


@contextlib.contextmanager
def synced(raw: io.RawIOBase) -> Iterator[SyncedWriter]:
    """Open a raw file for writing, sync it to the disk at the end, and close it.

    Raises:
        OSError: As the file raised it, also where ``torch.save`` turned it into another error.
    """
    with SyncedWriter(raw) as stream:
        try:
            yield stream
        except Exception:
            if stream.error is not None:
                raise stream.error from None
            raise


def write_file(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file under its final name when it is complete and on the disk; until then an earlier one stays.

    Args:
        path: The file. Its folder is created; an earlier file or sharded checkpoint is replaced.
        write: Called with a stream that has ``write`` and ``flush``, as ``torch.save`` needs it.

    Raises:
        SaveError: If the file system refuses; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.saving")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = io.FileIO(temporary, "wb")
        _lock(raw.fileno())
        with synced(raw) as stream:
            write(stream)
        put_in_place(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise save_error(path, error) from error
        raise


def put_in_place(new: Path, path: Path) -> None:
    """Rename a complete, synced file or folder to its final name, and remove what had this name before."""
    replaced = replaced_path(path)
    number = new.stat().st_ino
    if path.is_dir() or (new.is_dir() and os.path.lexists(path)):
        remove_all(replaced)
        path.rename(replaced)
    try:
        new.replace(path)
    except OSError:
        # Between the two renames another process may have restored the new one.
        if not path.exists() or path.stat().st_ino != number:
            if os.path.lexists(replaced) and not os.path.lexists(path):
                replaced.rename(path)
            raise
    try:
        sync_folder(path.parent)
    finally:
        remove_all(replaced)


def put_aside(path: Path) -> Path:
    """Rename a folder that is about to be removed, and return where it is now; anything else stays."""
    if not path.is_dir() or path.is_symlink():
        return path
    replaced = replaced_path(path)
    remove_all(replaced)
    return path.rename(replaced)


def save_error(path: Path, error: OSError) -> SaveError:
    """Return the error of a checkpoint that could not be saved, in one line that says what is left."""
    left = "the checkpoint under this name is whole" if path.exists() else "nothing is left of it"
    return SaveError(f"'{path}' could not be saved: {error.strerror or error}; {left}")


def restore(path: Path) -> None:
    """Put a folder back that a save, killed between its two renames, has left under another name.

    The new one is taken if it is complete, else the earlier one. Nothing happens if there is something at ``path``. Any
    number of processes may call this at the same time.

    Args:
        path: The final name.
    """
    for source in (saving_path(path), replaced_path(path)):
        if os.path.lexists(path):
            return
        if source.exists() and is_whole(source):
            # It fails where another process was faster.
            with contextlib.suppress(OSError):
                source.rename(path)
                sync_folder(path.parent)
                rank_zero_info(f"'{path}' is restored from {source.name}: the process that saved it was killed")


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left of their saves, one line each; checkpoints among it are restored first.

    What a living process writes stays. Where the file system has no locks nothing is removed, only named.
    """
    if not folder.is_dir():
        return
    for leftover in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match is None:
            continue
        restore(folder / match["name"])
        state = _in_use(leftover)
        if state is None and os.path.lexists(leftover):
            rank_zero_info(f"'{leftover}' is left of a save: remove it if no process writes it")
        elif state is False:
            remove_all(leftover)
            rank_zero_info(f"removed '{leftover}': the process that saved it was killed")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Mark a folder as being written by this process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_written_by_another(folder: Path) -> bool:
    """Return whether a living process writes a folder, as far as the file system can tell."""
    return _in_use(folder) is True


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_all(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed. False: another process has it; None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _in_use(path: Path) -> bool | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        state = _lock(descriptor)
    finally:
        os.close(descriptor)
    return None if state is None else not state
