"""What the user wrote, key by key and with its place: the text of config files and command line, before parsing.

The parser returns final values. Two questions need the text: which file an error is in, and whether a value was asked
for or is a default.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_muon.cli.layers import Layer, flatten, options

INTERPOLATION = re.compile(r"\$\{([a-zA-Z][\w.\[\]]*)\}")


@dataclass(frozen=True)
class Given:
    """One value as it was written.

    Attributes:
        key: Its key in the form of :func:`plain_key`, so that all spellings of a key are equal.
        value: The value as YAML or the command line has it, interpolations unresolved.
        file: The config file it is in, or ``None`` for the command line.
        asked: ``True`` for the command line and every ``--config``; ``False`` for the default config.
    """

    key: str
    value: object
    file: str | None
    asked: bool


def plain_key(key: str) -> str:
    """Return the key without ``init_args``, ``dict_kwargs``, list positions and the ``+`` of an appended list."""
    parts = [part.rstrip("+") for part in key.split(".")]
    return ".".join(part for part in parts if part not in {"init_args", "dict_kwargs"} and not part.isdigit())


def value_of(given: Sequence[Given], *keys: str) -> object:
    """Return the value that was given last for one of these keys, or ``None``."""
    return next((entry.value for entry in reversed(given) if entry.key in keys), None)


def place_of(key: str, given: Sequence[Given]) -> str:
    """Return a phrase with the file in which a key was given last; an empty string for the command line."""
    outer = plain_key(key)
    files = (entry.file for entry in reversed(given) if entry.key == outer or entry.key.startswith(f"{outer}."))
    file = next(files, None)
    return f" (in {file})" if file else ""


def given_in(layers: Sequence[Layer]) -> list[Given]:
    """List all values of some layers; later ones override earlier ones."""
    values = {id(layer): value for layer, value in options(layers)}
    given: list[Given] = []
    for layer in layers:
        if layer.content is not None:
            entries = flatten(layer.content)
            given += [Given(plain_key(key), value, layer.file, layer.asked) for key, value in entries]
        elif layer.option:
            given.append(Given(plain_key(layer.option.lstrip("-")), values[id(layer)], None, asked=True))
    return given
