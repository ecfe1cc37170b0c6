"""Which parameters or modules a monitor is asked about: all, none, or those whose names fit a pattern."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        if isinstance(self.wanted, str) or not (
            isinstance(self.wanted, bool) or all(isinstance(pattern, str) for pattern in self.wanted)
        ):
            raise MisconfigurationException(
                f"{self.argument} must be true, false or a list of patterns such as ['*.mlp.*'], got {self.wanted!r}"
            )

    def takes(self, name: str) -> bool:
        """Whether a name is chosen."""
        if isinstance(self.wanted, bool):
            return self.wanted
        return any(fnmatchcase(name, pattern) for pattern in self.wanted)

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
                raise MisconfigurationException(
                    f"{self.argument} has the pattern {pattern!r}, which matches no name. There are {some(names)}."
                )


def some(names: Sequence[str]) -> str:
    """Write the first few names, and how many there are beyond."""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return f"{', '.join(names[:NAMED_AT_MOST])}{more}" if names else "none"
