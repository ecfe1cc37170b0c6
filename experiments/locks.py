"""Locks on files, which the kernel releases when a process ends, however it ends."""

from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


class StudyError(ValueError):
    """A study cannot start or go on; the message is one line for the user."""


def lock(path: Path, descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process; it ends with the process, or when the process closes the file.

    Args:
        path: Its name, for messages.
        descriptor: Open for writing.
        wait: Until other processes release it.

    Returns:
        Whether this process has it now.

    Raises:
        StudyError: If the system or the file system has no locks.
    """
    if fcntl is None:
        raise StudyError("studies need a system with locks of files as Linux and macOS have them")
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise StudyError(
            f"'{path}' cannot be locked ({error.strerror}): put the study on another file system"
        ) from error
    return True
