"""Arguments that several callbacks take: numbers, whole numbers, and names chosen by pattern."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeGuard

from lightning.pytorch.utilities.exceptions import MisconfigurationException

# The most names that a message lists.
LISTED_NAMES = 5


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(callback: str, least: int = 1, optional: bool = False, **arguments: int | None) -> None:
    """Raise a MisconfigurationException unless every argument is a whole number and large enough.

    Args:
        callback: The class that takes the arguments, for the message.
        least: The smallest valid value.
        optional: Whether None is valid too.
        arguments: Values by the names of the arguments.
    """
    for name, value in arguments.items():
        if not (optional and value is None) and not (is_whole(value) and value >= least):
            valid = f"at least {least}" if is_whole(value) else f"a whole number{' or null' if optional else ''}"
            raise MisconfigurationException(f"{callback}: {name} must be {valid}, got {value!r}")


@dataclass(frozen=True)
class NameChoice:
    """Choose all names, none, or those that match a pattern.

    Args:
        argument: The callback and its argument, for messages: ``"WeightRMSMonitor: per_parameter"``.
        wanted: True for all, False for none, or shell patterns with ``*``, ``?`` and ``[…]``.

    Raises:
        MisconfigurationException: If ``wanted`` is neither a bool nor a list of strings.
    """

    argument: str
    wanted: bool | Sequence[str]

    def __post_init__(self) -> None:
        patterns = isinstance(self.wanted, (list, tuple)) and all(isinstance(pattern, str) for pattern in self.wanted)
        if not patterns and not isinstance(self.wanted, bool):
            raise MisconfigurationException(
                f"{self.argument} must be true, false or a list of patterns such as ['*.mlp.*'], got {self.wanted!r}"
            )

    def takes(self, name: str) -> bool:
        """Return whether a name is chosen."""
        if isinstance(self.wanted, bool):
            return self.wanted
        return any(fnmatchcase(name, pattern) for pattern in self.wanted)

    def by_pattern(self, names: Iterable[str]) -> set[str]:
        """Return the names that match a pattern; none if there are no patterns."""
        return set() if isinstance(self.wanted, bool) else {name for name in names if self.takes(name)}

    def check(self, names: Iterable[str]) -> None:
        """Raise a MisconfigurationException with the most similar names if a pattern matches none of the names."""
        for problem in self.unmatched(names):
            raise MisconfigurationException(problem)

    def unmatched(self, names: Iterable[str]) -> Iterator[str]:
        """Yield a sentence with the most similar names for each pattern that matches none of the names."""
        if isinstance(self.wanted, bool):
            return
        names = list(names)
        for pattern in self.wanted:
            if not any(fnmatchcase(name, pattern) for name in names):
                nearest = get_close_matches(pattern, names, n=LISTED_NAMES, cutoff=0.0)
                ordered = [*nearest, *(name for name in names if name not in nearest)]
                yield f"{self.argument} has the pattern {pattern!r}, which matches no name. There are {some(ordered)}."


def some(names: Sequence[str]) -> str:
    """Format the first few names and the number of the others."""
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return f"{', '.join(names[:LISTED_NAMES])}{more}" if names else "none"
