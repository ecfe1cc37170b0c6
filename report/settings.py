"""The settings of a run as it saved them, and how they are written short."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Settings = Mapping[str, Any]  # values by dotted keys, without `init_args`

HPARAMS = "hparams.yaml"  # of Lightning's loggers
_CONFIG = re.compile(r"config(-(?P<number>\d+))?\.yaml")  # of the command line; a run that goes on writes another one
# Where a run was written, what it was called, what it showed of itself: two runs that differ only in these are alike.
_PLACES = {
    "_instantiator",
    "ckpt_path",
    "default_root_dir",
    "dirpath",
    "enable_model_summary",
    "enable_progress_bar",
    "experiment_name",
    "log_dir",
    "logger",
    "num_sanity_val_steps",
    "output_dir",
    "run_name",
    "save_dir",
}
_CHECKPOINT = re.compile(r"\w*Checkpoint(-\d+)?")  # the callbacks: which files are kept
_SEED = re.compile(r"(.*_)?seed(_everything)?|random_state")
_LONGEST_VALUE = 24


@dataclass(frozen=True)
class ClassPath:
    """The import path of a class that the settings choose."""

    path: str

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.rpartition(".")[2]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads what Lightning dumps, without making an object of it."""


def _not_an_object(loader: Any, tag: str, node: yaml.Node) -> Any:
    """Return the entries of a tuple; of any other Python object what it is."""
    return loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else tag.rpartition(":")[2]


_Loader.add_multi_constructor("", _not_an_object)


def read_settings(folder: Path) -> Settings | None:
    """Return the settings of the run in a folder; ``None`` if it saved none that can be read.

    They are in the last ``config.yaml`` of the command line, or else in the ``hparams.yaml`` of a logger.
    """
    found = {int(name["number"] or 0): file for file in folder.iterdir() if (name := _CONFIG.fullmatch(file.name))}
    for file in [*(found[number] for number in sorted(found, reverse=True)), folder / HPARAMS]:
        try:
            tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - it is a safe one
        except (OSError, UnicodeError, yaml.YAMLError):
            continue
        if isinstance(tree, dict) and tree:
            return dict(_leaves(tree, ()))
    return None


def is_seed(key: str) -> bool:
    """Return whether a key is that of a seed."""
    return _SEED.fullmatch(key.rpartition(".")[2]) is not None


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the last parts of keys, as many as tell them apart."""
    parts = [[part for part in key.split(".") if part != "init_args"] for key in keys]
    lengths = [
        next(
            (
                length
                for length in range(1, len(own) + 1)
                if sum(other[-length:] == own[-length:] for other in parts) == 1
            ),
            len(own),
        )
        for own in parts
    ]
    return [
        re.sub(r"[^A-Za-z0-9._+-]+", "-", ".".join(own[-length:])) for own, length in zip(parts, lengths, strict=True)
    ]


def written(values: Sequence[Any]) -> list[str]:
    """Return values in few characters, as many as tell different ones apart."""
    short, long = [_written(value) for value in values], [canonical(value) for value in values]
    return short if len(set(short)) == len(set(long)) else long


def canonical(value: Any) -> str:
    """Return a text that is the same for equal values only."""
    if isinstance(value, ClassPath):
        return value.path
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values; that of an object is its class, and one of a list, such as a callback, has its own key."""
    if path and (path[-1] in _PLACES or _CHECKPOINT.fullmatch(path[-1])):
        return
    if _is_object(value):
        yield ".".join(path), ClassPath(value["class_path"])
        yield from _leaves_of_mapping(_arguments(value), path)
    elif isinstance(value, dict) and value:
        yield from _leaves_of_mapping(value, path)
    elif isinstance(value, list) and value and all(map(_is_object, value)):
        of_class: Counter[str] = Counter()
        for one in value:
            name = ClassPath(one["class_path"]).name
            of_class[name] += 1
            key = name if of_class[name] == 1 else f"{name}-{of_class[name]}"
            if not _CHECKPOINT.fullmatch(key):
                yield ".".join([*path, key]), "yes"
                yield from _leaves_of_mapping(_arguments(one), (*path, key))
    else:
        yield ".".join(path), value


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_path"), str)


def _arguments(value: Mapping[str, Any]) -> Mapping[Any, Any]:
    given = [value.get(name) for name in ("init_args", "dict_kwargs")]
    return {key: argument for one in given if isinstance(one, dict) for key, argument in one.items()}


def _leaves_of_mapping(values: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from _leaves(value, (*path, str(key)))


def _written(value: Any) -> str:
    if isinstance(value, ClassPath):
        text = value.name
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = canonical(value)
    return text if len(text) <= _LONGEST_VALUE else f"…{text[1 - _LONGEST_VALUE :]}"
