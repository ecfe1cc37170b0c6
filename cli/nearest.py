"""The valid name that someone may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, valid: Iterable[str], similarity: float = 0.6) -> str:
    """A phrase ``; did you mean 'x'?`` with the valid name closest to ``name``, or nothing when none is close.

    Args:
        name: What was given.
        valid: What would have been right.
        similarity: From which ``difflib`` ratio on, between 0 and 1, a name counts as close.
    """
    spellings = {candidate.lower(): candidate for candidate in valid}
    matches = get_close_matches(name.lower(), list(spellings), n=5, cutoff=similarity)
    if not matches:
        return ""
    # By edits, because difflib takes AdamV for Adam rather than for AdamW: it counts a wrong letter as two.
    match = min(matches, key=lambda match: (_edits(name.lower(), match), abs(len(match) - len(name))))
    return f"; did you mean '{spellings[match]}'?"


def _edits(first: str, second: str) -> int:
    """The Levenshtein distance: how many letters must be added, dropped or exchanged."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        above, row = row, [i]
        for j, other in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
    return row[-1]
