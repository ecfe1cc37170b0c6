"""The options of the methods: their defaults, and checks of numbers among them."""

import inspect
from collections.abc import Callable
from functools import cache
from math import isfinite
from typing import Any

# Below, it lies far under the rounding of float64, and its powers leave the range.
SMALLEST_LOWER_BOUND = 1e-30


def is_number(value: object) -> bool:
    """Return whether a value is a finite real number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def check_whole(name: str, value: object) -> None:
    """Raise a ValueError if an option is not a whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_lower_bound(value: object) -> None:
    """Raise a ValueError if the lower bound of singular values is not a number between 10⁻³⁰ and 1."""
    if not isinstance(value, int | float) or not SMALLEST_LOWER_BOUND < value < 1:
        raise ValueError(f"lower_bound must lie between {SMALLEST_LOWER_BOUND:g} and 1, got {value!r}")


@cache
def defaults_of(method: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a method with their defaults."""
    return {p.name: p.default for p in list(inspect.signature(method).parameters.values())[1:]}
