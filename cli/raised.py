"""Exceptions that tell the user what to change, apart from those that reveal a bug."""

import re
from collections.abc import Iterable
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_muon.cli.nearest import listed, nearest

# There Lightning checks the settings of the trainer, by ValueError where it has not come to MisconfigurationException.
_SETTINGS = "lightning.pytorch.trainer.connectors."
_EARLY_STOPPING = "lightning.pytorch.callbacks.early_stopping"


def message_for_the_user(error: BaseException, packages: Iterable[str]) -> str | None:
    """The message of an error that tells the user what to change; ``None`` for one that reveals a bug.

    Args:
        error: Any exception.
        packages: Top-level packages whose own ``ValueError``, ``TypeError`` and ``FileNotFoundError`` count as told to
            the user when they are raised there, not further down in a library.
    """
    if isinstance(error, MisconfigurationException):
        return str(error)
    module = _raised_in(error.__traceback__)
    package = module.split(".")[0]
    if isinstance(error, RuntimeError) and module == _EARLY_STOPPING:
        return _about_the_monitor(str(error))
    if isinstance(error, ModuleNotFoundError) and package == "lightning":
        # What was chosen needs a package that is not installed.
        return str(error)
    if not isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        return None
    if package == "jsonargparse" and error.__cause__:
        # It wraps what the constructor of a chosen class raises.
        return message_for_the_user(error.__cause__, packages)
    if isinstance(error, ValueError) and module.startswith(_SETTINGS):
        return str(error)
    return str(error) if package in set(packages) else None


def _raised_in(traceback: TracebackType | None) -> str:
    """The module of the innermost frame, or nothing."""
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")) if traceback else ""


def _about_the_monitor(message: str) -> str | None:
    """What ``EarlyStopping`` says of a metric that is not there, without the names of all the monitors' metrics."""
    match = re.match(r"Early stopping conditioned on metric `([^`]*)` which is not available", message)
    if not match:
        return None
    metrics = re.findall(r"`([^`]+)`", message.partition("any of the following:")[2])
    # Those that one may want to stop by come first.
    metrics.sort(key=lambda metric: not re.search("loss|acc|val|train", metric))
    alternative = nearest(match[1], metrics) or listed("; there are", metrics, most=8)
    return f"EarlyStopping: no metric '{match[1]}' was logged{alternative}"
