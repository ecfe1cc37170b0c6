"""Errors of the file system, told with the setting that names the file or folder."""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_muon.cli.given import plain_key
from lightning_muon.cli.layers import flatten

# What the machine refuses, wherever it happens.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP}
# What is the user's where a setting names the path, and may be a bug elsewhere.
_WRONG_PATH = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def check_folders(trainer: Trainer) -> None:
    """Refuse folders for logs and checkpoints that cannot be made or written to, before the data are prepared.

    Raises:
        OSError: With the path that is in the way.
    """
    if not trainer.is_global_zero:
        return
    for folder in _written_folders(trainer):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def explain_file_error(error: OSError, config: Mapping[str, Any]) -> str | None:
    """Return one line for a file or folder that cannot be used, with the setting that names it.

    Args:
        error: An error of the operating system.
        config: The configuration of the subcommand as plain values.

    Returns:
        ``None`` for a bug, such as a file that is missing although no setting names it.
    """
    if error.errno not in _REFUSED | _WRONG_PATH or not isinstance(error.filename, (str, bytes)):
        return None
    file = Path(os.fsdecode(error.filename))
    key = _setting(file.absolute(), config)
    if key is None and error.errno in _WRONG_PATH:
        return None
    reason = "there is a file of this name" if error.errno == errno.EEXIST else error.strerror
    remedy = f"; choose another by --{key}" if key else ""
    return f"{f'{key}: ' if key else ''}'{file}' cannot be used: {reason}{remedy}"


def _written_folders(trainer: Trainer) -> Iterator[Path]:
    paths = [getattr(logger, "save_dir", None) for logger in trainer.loggers] or [trainer.default_root_dir]
    callbacks = trainer.checkpoint_callbacks
    paths += [callback.dirpath for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    for path in paths:
        if path is not None and "://" not in str(path):
            yield Path(path).absolute()


def _setting(file: Path, config: Mapping[str, Any]) -> str | None:
    """Return the key of the longest path in the configuration that is this file or a folder above it."""
    found: dict[int, str] = {}
    for key, value in flatten(dict(config)):
        if isinstance(value, str) and value and not value.isspace() and "\0" not in value:
            path = Path(value).absolute()
            if path == file or path in file.parents:
                found[len(path.parts)] = plain_key(key)
    return found[max(found)] if found else None
