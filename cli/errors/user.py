"""Which exceptions are the user's mistakes, shown as one line; all others are bugs and keep their traceback."""

import re
from collections.abc import Iterable
from dis import opmap
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_muon.cli.errors.suggestions import listed, nearest

# Lightning checks settings there, in part by ValueError or TypeError instead of MisconfigurationException.
_SETTINGS = (
    "lightning.fabric.accelerators.",
    "lightning.fabric.utilities.device_parser",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.accelerators.",
    "lightning.pytorch.loops.fit_loop",
    "lightning.pytorch.trainer.",
)
_EARLY_STOPPING = "lightning.pytorch.callbacks.early_stopping"


def message_for_the_user(error: BaseException, packages: Iterable[str]) -> str | None:
    """Return the message of an error that the user can correct; ``None`` for a bug.

    Args:
        error: Any exception.
        packages: Top-level packages whose own ``ValueError``, ``TypeError`` and ``OSError`` are for the user.
            They count only where the package itself raises them, not a library that it calls.
    """
    if isinstance(error, MisconfigurationException):
        return _about_the_checkpoint(str(error)) or str(error)
    module = _raised_in(error.__traceback__)
    package = module.split(".")[0]
    if isinstance(error, RuntimeError) and module == _EARLY_STOPPING:
        return _about_the_metric(str(error))
    if isinstance(error, ModuleNotFoundError) and package in {"lightning", "lightning_muon"}:
        return str(error)  # a chosen class needs a package that is not installed
    if not isinstance(error, (ValueError, TypeError, OSError)):
        return None
    if package == "jsonargparse" and error.__cause__:
        # jsonargparse wraps what the constructor of a chosen class raises.
        return message_for_the_user(error.__cause__, packages)
    if isinstance(error, (ValueError, TypeError)) and module.startswith(_SETTINGS):
        return str(error)
    return str(error) if package in set(packages) else None


def raised_on_purpose(error: BaseException) -> bool:
    """Return whether a ``raise`` has raised an error, not an operation of Python that failed, as in ``a, b = 3``."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback is None or traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == opmap["RAISE_VARARGS"]


def _raised_in(traceback: TracebackType | None) -> str:
    """Return the module of the innermost frame, or an empty string."""
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")) if traceback else ""


def _about_the_metric(message: str) -> str | None:
    """Shorten what ``EarlyStopping`` says about a missing metric: it lists the metrics of all monitors."""
    match = re.match(r"Early stopping conditioned on metric `([^`]*)` which is not available", message)
    if not match:
        return None
    metrics = re.findall(r"`([^`]+)`", message.partition("any of the following:")[2])
    return f"EarlyStopping: no metric '{match[1]}' was logged{_alternatives(match[1], metrics)}"


def _about_the_checkpoint(message: str) -> str | None:
    """Say what to do where ``ModelCheckpoint`` misses its metric; a module has its own names."""
    match = re.match(r"`ModelCheckpoint\(monitor='([^']*)'\)` could not find .*?: \[(.*)\]", message)
    if not match:
        return None
    metrics = [metric for metric in re.findall(r"'([^']+)'", match[2]) if metric not in {"epoch", "step"}]
    return (
        f"ModelCheckpoint: no metric '{match[1]}' was logged: log it, or give the checkpoint another 'monitor' in a"
        f" config{_alternatives(match[1], metrics)}"
    )


def _alternatives(metric: str, metrics: list[str]) -> str:
    # First the likely ones.
    metrics.sort(key=lambda metric: not re.search("loss|acc|val|train", metric))
    return nearest(metric, metrics) or listed("; there are", metrics, most=8)
