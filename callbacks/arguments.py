"""What arguments may be, said alike by all monitors."""

from typing import TypeGuard

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(owner: str, name: str, value: int | None, least: int = 1, optional: bool = False) -> None:
    """Refuse what is not a whole number, or too small.

    Args:
        owner: Whose argument it is.
        name: Of the argument.
        value: Of the argument.
        least: The smallest value.
        optional: Whether it may be None.

    Raises:
        MisconfigurationException: With the argument, what it may be, and what it is.
    """
    if (optional and value is None) or (is_whole(value) and value >= least):
        return
    demand = f"at least {least}" if is_whole(value) else f"a whole number{' or null' if optional else ''}"
    raise MisconfigurationException(f"{owner}: {name} must be {demand}, got {value!r}")
