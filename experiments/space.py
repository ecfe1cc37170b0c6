"""What a sweep varies: choices and ranges of keys of the configuration, and the names of the trials."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import yaml

from lightning_muon.experiments.trial import Trial
from lightning_muon.report.settings import short_names

EXAMPLES = "KEY=0.01,0.02,0.04 or KEY=1e-4..1e-1 or KEY=log:1e-4..1e-1/7"

_RANGE = re.compile(r"(?P<log>log:)?(?P<low>[^,\[{]+?)\.\.(?P<high>[^,\[{]+?)(/(?P<points>\d+))?")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Choices:
    """Values of a key, of any kind that YAML has."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """All numbers between two, both included; integers if both are."""

    key: str
    low: float
    high: float
    log: bool = False

    @property
    def is_of_integers(self) -> bool:
        """Whether only whole numbers are in it."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def points(self, number: int) -> Choices:
        """Return evenly spaced values, with both ends; in a logarithmic range their ratios are equal."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        places = [low + (high - low) * step / (number - 1) for step in range(number)]
        values = [math.exp(place) if self.log else place for place in places]
        rounded = [round(value) if self.is_of_integers else shortened(value) for value in values]
        return Choices(self.key, tuple(dict.fromkeys([self.low, *rounded[1:-1], self.high])))


Dimension = Choices | Range


def parse(text: str) -> Dimension:
    """Return what ``KEY=SPEC`` says.

    Raises:
        ValueError: If it says nothing.
    """
    key, equals, spec = text.partition("=")
    key = key.strip().lstrip("-")
    if not (key and equals and spec.strip()):
        raise ValueError(f"--vary {text}: expected {EXAMPLES}")
    found = _RANGE.fullmatch(spec.strip())
    if found is None:
        if spec.strip().startswith("log:"):
            raise ValueError(f"--vary {text}: after log: expected two numbers, as in log:1e-4..1e-1")
        return Choices(key, _choices(text, spec))
    low, high = _number(found["low"]), _number(found["high"])
    if low is None or high is None:
        raise ValueError(f"--vary {text}: a range goes between two numbers, as in 1e-4..1e-1")
    if not low < high or (found["log"] and low <= 0):
        above = "above 0, and " if found["log"] else ""
        raise ValueError(f"--vary {text}: the first number must be {above}below the second")
    within = Range(key, low, high, bool(found["log"]))
    if found["points"] is None:
        return within
    if int(found["points"]) < 2:
        raise ValueError(f"--vary {text}: a range has at least 2 points")
    return within.points(int(found["points"]))


def grid(dimensions: Sequence[Choices]) -> list[Trial]:
    """Return all combinations; the last key varies fastest."""
    combinations = product(*(dimension.values for dimension in dimensions))
    keys = [dimension.key for dimension in dimensions]
    trials: list[Trial] = []
    names: set[str] = set()
    for values in combinations:
        trials.append(named(dict(zip(keys, values, strict=True)), names))
        names.add(trials[-1].name.casefold())
    return trials


def named(options: Mapping[str, Any], taken: set[str]) -> Trial:
    """Return the trial with these options, with a name such as ``moonlight,lr=0.01,weight_decay=0.1``.

    Args:
        options: Of the trial, by keys.
        taken: Names of other trials, in small letters.
    """
    names = dict(zip(options, short_names(list(options)), strict=True))
    # Config files and presets say by their names what they are.
    parts = [
        _fit_for_a_folder(_configs(value) if key == "config" else f"{names[key]}={_written(value)}")
        for key, value in options.items()
    ]
    name = ",".join(parts)[:_LONGEST_NAME]
    for candidate in _candidates(name):
        if candidate.casefold() not in taken:
            return Trial(candidate, options)
    raise AssertionError


def shortened(value: float) -> float:
    """Return a number with four digits, which is easier to read and to type."""
    return float(f"{value:.4g}")


def _candidates(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        yield f"{name}-{number}"


def _fit_for_a_folder(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", text)


def _configs(value: object) -> str:
    return "+".join(Path(str(one)).stem for one in (value if isinstance(value, list) else [value]))


def _written(value: object) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices(text: str, spec: str) -> tuple[Any, ...]:
    try:
        values = yaml.safe_load(f"[{spec}]")
    except yaml.YAMLError as error:
        raise ValueError(f"--vary {text}: not a list of YAML values, separated by commas") from error
    values = json.loads(json.dumps(values, default=str))  # a date is a text
    numbers = [_number(value) if isinstance(value, str) else None for value in values]
    values = [value if number is None else number for value, number in zip(values, numbers, strict=True)]
    twice = [value for place, value in enumerate(values) if value in values[:place]]
    if twice:
        raise ValueError(f"--vary {text}: the value {twice[0]} stands there twice")
    return tuple(values)


def _number(text: str) -> float | int | None:
    """Return a number as the command line has it: YAML takes 1e-4 for a text."""
    for kind in (int, float):
        try:
            number = kind(text.strip())
        except ValueError:
            continue
        return number if math.isfinite(number) else None
    return None
