"""What the user wrote, key by key and with its place: the text of config files and command line, before parsing.

The parser returns final values. Two questions need the text: which file an error is in, and whether a value was asked
for or is a default.
"""

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_muon.cli.errors.suggestions import nearest_path

INTERPOLATION = re.compile(r"\$\{([a-zA-Z][\w.\[\]]*)\}")


class ConfigFileError(ValueError):
    """A config file that is missing or cannot be read; the message is one line for the user."""


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


def read_given(default_config: str | None, args: Sequence[str]) -> list[Given]:
    """List all given values; later ones override earlier ones.

    Args:
        default_config: The config file below all others.
        args: The arguments after the subcommand.

    Raises:
        ConfigFileError: If one of the config files cannot be read.
    """
    given = list(_in_file(default_config, asked=False)) if default_config else []
    for option, value in _options(args):
        if option not in {"-c", "--config"}:
            given.append(Given(plain_key(option.lstrip("-")), value, None, asked=True))
        elif value is not None and not value.lstrip().startswith("{"):
            given.extend(_in_file(value, asked=True))
    return given


def flatten(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the leaves of nested dicts and lists with their dotted keys; an empty dict or list is a leaf."""
    children: Iterator[tuple[object, object]]
    if isinstance(node, dict) and node:
        children = iter(node.items())
    elif isinstance(node, list) and node:
        children = iter(enumerate(node))
    else:
        yield prefix, node
        return
    for name, child in children:
        yield from flatten(child, f"{prefix}.{name}" if prefix else str(name))


def _options(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each option with its value, written ``--key value`` or ``--key=value``."""
    for position, arg in enumerate(args):
        if not re.match(r"--?[a-zA-Z]", arg):
            continue
        option, equals, value = arg.partition("=")
        following = args[position + 1] if position + 1 < len(args) else None
        yield option, value if equals else following


def _in_file(path: str, asked: bool) -> Iterator[Given]:
    for key, value in flatten(_read_config_file(path)):
        yield Given(plain_key(key), value, path, asked)


def _read_config_file(path: str) -> dict[str, object]:
    file = Path(path)
    if not file.is_file():
        raise ConfigFileError(f"config file '{path}' does not exist{nearest_path(file, '*.y*ml')}")
    try:
        content = yaml.safe_load(file.read_text())
    except UnicodeDecodeError as error:
        hint = ": a checkpoint goes to --ckpt_path" if zipfile.is_zipfile(file) else ""
        raise ConfigFileError(f"config file '{path}' is not a text file{hint}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not a YAML file"
        raise ConfigFileError(f"config file '{path}'{where}: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigFileError(f"config file '{path}' holds no keys: expected lines such as 'trainer:' or 'model:'")
    return content
