"""What differs between runs: the keys of their settings that have changed, as the columns of a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_muon.report.plain_text import printable
from lightning_muon.report.settings import ClassPath, Settings, canonical, is_seed, short_names, written

NOTHING = "–"  # of a key that a run does not have


@dataclass(frozen=True)
class Column:
    """A key that has changed, or several that have the same values in all runs.

    Attributes:
        names: The last parts of the keys, as many as tell them apart.
        values: Of each run, in few characters.
        is_class: Whether the values are names of classes, which need no name of the key beside them.
    """

    names: tuple[str, ...]
    values: tuple[str, ...]
    is_class: bool

    @property
    def title(self) -> str:
        """The names."""
        return ", ".join(self.names)

    def label(self, run: int) -> str:
        """Return the value with its name, such as ``lr=0.01``; empty if the run does not have the key."""
        value = self.values[run]
        return "" if value == NOTHING else value if self.is_class else f"{self.names[0]}={value}"


def columns(settings: Sequence[Settings | None]) -> list[Column]:
    """Return what differs between runs, their seeds apart; classes come first."""
    keys = [key for key in changed(settings) if not is_seed(key)]
    found: dict[tuple[str, ...], Column] = {}
    for key, name in zip(keys, short_names(keys), strict=True):
        column = _column(key, name, settings)
        same = found.get(column.values)
        found[column.values] = column if same is None else replace(same, names=(*same.names, name))
    return sorted(found.values(), key=lambda column: not column.is_class)


def describe(columns: Iterable[Column], run: int) -> str:
    """Return what tells a run apart, such as ``AdamW, lr=0.01``."""
    columns = list(columns)
    has = filter(None, (column.label(run) for column in columns))
    return ", ".join(has) or ", ".join(f"{column.names[0]}={NOTHING}" for column in columns)


def seeds(settings: Sequence[Settings | None]) -> list[tuple[int | str, ...]]:
    """Return the seeds of each run, of those that are not the same in all runs."""
    varying = [key for key in changed(settings) if is_seed(key)]
    return [() if one is None else tuple(_seed(one.get(key)) for key in varying) for one in settings]


def changed(settings: Sequence[Settings | None]) -> list[str]:
    """Return the keys that have not the same value in all runs that saved their settings; the model's come first.

    What belongs to an object, such as the options of an optimizer, is not compared with a run that has another one and
    no such key: the object itself has changed.
    """
    saved = [one for one in settings if one is not None]
    keys = dict.fromkeys(key for one in saved for key in one)
    parents = {key[:place] for key in keys for place, char in enumerate(key) if char == "."}
    found: set[str] = set()
    for key in sorted(keys, key=lambda key: key.count(".")):  # an object before its options
        values = {canonical(one[key]) for one in saved if key in one}
        if key in parents and values == {canonical(None)}:
            continue  # an empty mapping, where other runs have keys in it
        is_missing = not all(key in one for one in saved)
        if len(values) > 1 or (is_missing and not any(key.startswith(f"{other}.") for other in found)):
            found.add(key)
    sections = {"model": 0, "data": 1}
    return sorted((key for key in keys if key in found), key=lambda key: sections.get(key.partition(".")[0], 2))


def _seed(value: Any) -> int | str:
    return value if isinstance(value, int) else canonical(value)


def _column(key: str, name: str, settings: Sequence[Settings | None]) -> Column:
    values = [one[key] for one in settings if one is not None and key in one]
    texts = iter(written(values))
    return Column(
        (name,),
        tuple(printable(next(texts)) if one is not None and key in one else NOTHING for one in settings),
        all(isinstance(value, ClassPath) for value in values),
    )
