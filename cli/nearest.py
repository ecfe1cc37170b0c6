"""The valid name, file or key that someone may have meant, or which ones there are."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

# What other trainers and optimizers call it. The key is suggested only where it exists.
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
    """A phrase ``; did you mean 'x'?`` with the valid name closest to ``name``, or nothing when none is close.

    Args:
        name: What was given.
        valid: What would have been right.
        similarity: From which ``difflib`` ratio on, between 0 and 1, a name counts as close.
    """
    match = _closest(name, valid, similarity)
    return f"; did you mean '{match}'?" if match else ""


def nearest_key(key: str, valid: Iterable[str], elsewhere: Iterable[str] = (), owner: str = "") -> str:
    """A phrase with the key that may be meant, or else with the keys where this one was looked for.

    Keys are compared name by name: what two of them share on the way is no likeness.

    Args:
        key: What was given, such as ``trainer.max_step``.
        valid: Keys among which a mistake in any name of the key is looked for.
        elsewhere: Further keys that count only if their last name is that of ``key``, which then stands in a wrong
            place.
        owner: What to call that which takes the keys, in a list of them.
    """
    paths = [other.split(".") for other in valid]
    path = _corrected(key.split("."), paths)
    if path and path != key.split(".")[: len(path)]:
        return f"; did you mean '{'.'.join(path)}'?"
    name = key.rpartition(".")[2]
    names = {name, _ALSO_CALLED.get(name, name)}
    misplaced = dict.fromkeys(other for other in elsewhere if other.rpartition(".")[2] in names and other != key)
    if misplaced:
        return f"; did you mean {' or '.join(repr(other) for other in list(misplaced)[:3])}?"
    parent, below = _where_it_ends(key.split("."), paths)
    takes = f"; {owner or '.'.join(parent)} takes" if parent else "; the keys are"
    return listed(takes, dict.fromkeys(path[0] for path in below)) or "; --help lists all keys"


def nearest_path(path: str | Path, pattern: str = "*") -> str:
    """A phrase with the file or folder that may be meant by a path at which there is nothing.

    Args:
        path: What was given.
        pattern: Which files count.
    """
    file = Path(path)
    missing = next((part for part in [*reversed(file.parents), file] if not part.exists()), file)
    if not missing.parent.is_dir():
        return ""
    there = missing.parent.glob(pattern) if missing == file else (p for p in missing.parent.iterdir() if p.is_dir())
    # By their stems, because a common ending is no likeness.
    siblings = {sibling.stem: sibling for sibling in sorted(there)}
    match = _closest(missing.stem, siblings, similarity=0.6)
    if match:
        return f"; did you mean '{siblings[match] / file.relative_to(missing)}'?"
    return listed(f"; in '{missing.parent}' there are", [sibling.name for sibling in siblings.values()])


def listed(phrase: str, names: Iterable[str], most: int = 20) -> str:
    """The phrase with the names behind it, the first of them if there are many; nothing if there is none."""
    every = list(names)
    return f"{phrase} {', '.join(every[:most])}{', …' if len(every) > most else ''}" if every else ""


def _closest(name: str, valid: Iterable[str], similarity: float = 0.6) -> str | None:
    spellings = {candidate.lower(): candidate for candidate in valid}
    matches = get_close_matches(name.lower(), list(spellings), n=5, cutoff=similarity)
    if not matches:
        return None
    # By edits, because difflib takes AdamV for Adam rather than for AdamW: it counts a wrong letter as two.
    match = min(matches, key=lambda match: (_edits(name.lower(), match), abs(len(match) - len(name))))
    return spellings[match]


def _corrected(path: Sequence[str], valid: Sequence[Sequence[str]]) -> list[str] | None:
    """The valid path that this one becomes when each wrong name is replaced by the closest one in its place."""
    names = {other[0] for other in valid}
    name: str | None = path[0]
    if name not in names:
        name = _ALSO_CALLED.get(path[0])
        name = name if name in names else _closest(path[0], sorted(names))
    if name is None:
        return None
    below = [other[1:] for other in valid if other[0] == name and len(other) > 1]
    if len(path) == 1 or not below:
        return [name]
    further = _corrected(path[1:], below)
    return None if further is None else [name, *further]


def _where_it_ends(path: Sequence[str], valid: Sequence[Sequence[str]]) -> tuple[list[str], list[Sequence[str]]]:
    """How far the path is right, and what could follow there."""
    parent: list[str] = []
    below = list(valid)
    for name in path:
        further = [other[1:] for other in below if other[0] == name and len(other) > 1]
        if not further:
            break
        parent, below = [*parent, name], further
    return parent, below


def _edits(first: str, second: str) -> int:
    """The Levenshtein distance: how many letters must be added, dropped or exchanged."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        above, row = row, [i]
        for j, other in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
    return row[-1]
