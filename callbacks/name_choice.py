"""Which parameters or modules a monitor is asked about: all, none, or those whose names fit a pattern."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lightning.pytorch.utilities.exceptions import MisconfigurationException

NAMED_AT_MOST = 5


@dataclass(frozen=True)
class NameChoice:
    """A choice of names.

    Args:
        argument: Who asks and by what argument, for messages: ``"WeightRMSMonitor: per_parameter"``.
        wanted: True is all, False none; else patterns with ``*``, ``?`` and ``[…]``, as in a shell.

    Raises:
        MisconfigurationException: If it is neither.
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
        """Whether a name is chosen."""
        if isinstance(self.wanted, bool):
            return self.wanted
        return any(fnmatchcase(name, pattern) for pattern in self.wanted)

    def by_pattern(self, names: Iterable[str]) -> set[str]:
        """Return the names that a pattern matches; none if the choice is all or nothing."""
        return set() if isinstance(self.wanted, bool) else {name for name in names if self.takes(name)}

    def check(self, names: Iterable[str]) -> None:
        """Refuse a pattern that matches none of the names.

        Raises:
            MisconfigurationException: With the pattern, and the names that there are.
        """
        if isinstance(self.wanted, bool):
            return
        names = list(names)
        for pattern in self.wanted:
            if not any(fnmatchcase(name, pattern) for name in names):
                nearest = get_close_matches(pattern, names, n=NAMED_AT_MOST, cutoff=0.0)
                ordered = [*nearest, *(name for name in names if name not in nearest)]
                raise MisconfigurationException(
                    f"{self.argument} has the pattern {pattern!r}, which matches no name. There are {some(ordered)}."
                )


def some(names: Sequence[str]) -> str:
    """Write the first few names, and how many there are beyond."""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return f"{', '.join(names[:NAMED_AT_MOST])}{more}" if names else "none"
