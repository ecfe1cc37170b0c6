"""Under which tags values and texts are logged.

A quantity has a name in the table, such as ``weight_rms/max``. Its tag is in one namespace, ``watch/weight_rms/max``,
so that loggers show all of them behind the losses of ``train/`` and ``val/``. What one should see first is in
``at_a_glance/`` and ``by_quantity/``, which sort before them: TensorBoard opens only the first two groups, and
Lightning logs an ``epoch``. Runs that were logged before there was a namespace have the names as tags, and are read all
the same.
"""

import math
from collections.abc import Callable

WATCH = "watch"  # what the callbacks measure
VERDICT = "by_quantity"  # the verdict on each quantity
LIMITS = "watch_limits"  # the ends of healthy ranges, as lines in the charts
GLANCE = "at_a_glance"  # the verdict on the run, the picture, and copies of loss and speed

HEALTH = f"{GLANCE}/health"  # the worst verdict; it sorts before the loss

# Quantities that had another name and scale in older runs.
_RENAMED: dict[str, tuple[str, Callable[[float], float]]] = {
    f"{source}_condition": (f"{source}_condition_log10", lambda value: math.log10(value) if value > 0 else math.nan)
    for source in ("gradient", "momentum")
}


def tag_of(name: str) -> str:
    """Return the tag of a value or text, by its name; a tag is returned as it is."""
    return name if is_ours(name) else f"{WATCH}/{name}"


def is_ours(tag: str) -> bool:
    """Return whether a tag is in one of the namespaces."""
    return tag.partition("/")[0] in {WATCH, VERDICT, LIMITS, GLANCE}


def name_of(tag: str) -> str:
    """Return the name of what was logged under a tag, with or without the namespace."""
    return tag.removeprefix(f"{WATCH}/")


def of_today(name: str, values: list[tuple[int, float]]) -> tuple[str, list[tuple[int, float]]]:
    """Return name and values of a quantity as they are logged today."""
    quantity, slash, of = name.partition("/")
    if quantity not in _RENAMED:
        return name, values
    renamed, convert = _RENAMED[quantity]
    return f"{renamed}{slash}{of}", [(step, convert(value)) for step, value in values]
