"""Suggestions for an error: the valid name, file or key closest to a wrong one, or a list of the valid ones."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

# Names in other trainers and optimizers. A key is suggested only where it exists.
_ALSO_CALLED = {
    "checkpoint": "ckpt_path",
    "epochs": "max_epochs",
    "gpus": "devices",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "learning_rate": "lr",
    "resume": "ckpt_path",
    "seed": "seed_everything",
    "steps": "max_steps",
    "wd": "weight_decay",
}


def nearest(name: str, valid: Iterable[str], similarity: float = 0.6) -> str:
    """Return ``; did you mean 'x'?`` with the valid name closest to ``name``; an empty string if none is close.

    Args:
        name: The wrong name.
        valid: The valid names.
        similarity: The least ``difflib`` ratio, between 0 and 1, of a close name.
    """
    match = _closest(name, valid, similarity)
    return f"; did you mean '{match}'?" if match else ""


def nearest_key(key: str, valid: Iterable[str], elsewhere: Iterable[str] = (), owner: str = "") -> str:
    """Return a phrase with the key that may be meant, or else with the keys that are valid in its place.

    Keys are compared name by name, because a common prefix such as ``trainer.`` is no likeness.

    Args:
        key: The wrong key, such as ``trainer.max_step``.
        valid: Keys among which a mistake in any name of the key is looked for.
        elsewhere: Further keys, suggested only if their last name is that of ``key``: the key is in a wrong place.
        owner: How to name what takes the valid keys.
    """
    names = key.split(".")
    paths: list[Sequence[str]] = [other.split(".") for other in valid]
    corrected = _corrected(names, paths)
    if corrected and corrected != names[: len(corrected)]:
        return f"; did you mean '{'.'.join(corrected)}'?"
    last = {names[-1], _ALSO_CALLED.get(names[-1], names[-1])}
    misplaced = dict.fromkeys(other for other in elsewhere if other.rpartition(".")[2] in last and other != key)
    if misplaced:
        return f"; did you mean {' or '.join(repr(other) for other in list(misplaced)[:3])}?"
    # The keys that are valid where the given one stops being so.
    parent: list[str] = []
    for name in names:
        further = _below(paths, name)
        if not further:
            break
        parent, paths = [*parent, name], further
    takes = f"; {owner or '.'.join(parent)} takes" if parent else "; the keys are"
    return listed(takes, dict.fromkeys(path[0] for path in paths)) or "; --help lists all keys"


def nearest_path(path: str | Path, pattern: str = "*") -> str:
    """Return a phrase with the file or folder that may be meant by a path that does not exist.

    Args:
        path: The wrong path.
        pattern: Which files to suggest.
    """
    file = Path(path)
    missing = next((part for part in [*reversed(file.parents), file] if not part.exists()), file)
    if not missing.parent.is_dir():
        return ""
    there = missing.parent.glob(pattern) if missing == file else (p for p in missing.parent.iterdir() if p.is_dir())
    # By their stems, because a common ending is no likeness.
    siblings = {sibling.stem: sibling for sibling in sorted(there)}
    match = _closest(missing.stem, siblings)
    if match:
        return f"; did you mean '{siblings[match] / file.relative_to(missing)}'?"
    return listed(f"; in '{missing.parent}' there are", [sibling.name for sibling in siblings.values()])


def listed(phrase: str, names: Iterable[str], most: int = 20) -> str:
    """Return the phrase followed by up to ``most`` names; an empty string if there are none."""
    every = list(names)
    return f"{phrase} {', '.join(every[:most])}{', …' if len(every) > most else ''}" if every else ""


def _closest(name: str, valid: Iterable[str], similarity: float = 0.6) -> str | None:
    spellings = {candidate.lower(): candidate for candidate in valid}
    matches = get_close_matches(name.lower(), list(spellings), n=5, cutoff=similarity)
    if not matches:
        return None
    # By edits: difflib takes AdamV for Adam rather than for AdamW, because it counts a wrong letter as two.
    return spellings[min(matches, key=lambda match: (_edits(name.lower(), match), abs(len(match) - len(name))))]


def _corrected(path: Sequence[str], valid: Sequence[Sequence[str]]) -> list[str] | None:
    """Return the valid path in which each wrong name is replaced by the closest one in its place, if there is one."""
    names = {other[0] for other in valid}
    name: str | None = path[0]
    if name not in names:
        name = _ALSO_CALLED.get(path[0])
        name = name if name in names else _closest(path[0], sorted(names))
    if name is None:
        return None
    below = _below(valid, name)
    if len(path) == 1 or not below:
        return [name]
    further = _corrected(path[1:], below)
    return None if further is None else [name, *further]


def _below(paths: Iterable[Sequence[str]], name: str) -> list[Sequence[str]]:
    return [path[1:] for path in paths if path[0] == name and len(path) > 1]


def _edits(first: str, second: str) -> int:
    """Return the Levenshtein distance: the number of letters to add, drop or exchange."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        above, row = row, [i]
        for j, other in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
    return row[-1]
