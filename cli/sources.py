"""What the user gave, key by key, and where: the text of the config files and of the command line, before any parsing.

The parser answers what a value *is* in the end. Two questions need the text instead: which file an error is in, and
whether a value was asked for or is only a default.
"""

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_muon.cli.nearest import nearest_path

INTERPOLATION = re.compile(r"\$\{([a-zA-Z][\w.\[\]]*)\}")


class ConfigFileError(ValueError):
    """A config file that is missing or cannot be read; the message is one line for the user."""


@dataclass(frozen=True)
class Given:
    """One value as it was written.

    Attributes:
        key: Where it goes, without the ``init_args`` levels, list positions and the ``+`` of an appended list, so that
            all spellings of a key are the same key.
        value: The value as YAML or the command line has it, interpolations unresolved.
        file: The config file it stands in, or ``None`` for the command line.
        asked: Whether the user asked for it, by the command line or a ``--config``; ``False`` for the default config.
    """

    key: str
    value: object
    file: str | None
    asked: bool


def plain_key(key: str) -> str:
    """The key without ``init_args``, ``dict_kwargs``, list positions and a trailing ``+``."""
    parts = [part.rstrip("+") for part in key.split(".")]
    return ".".join(part for part in parts if part not in {"init_args", "dict_kwargs"} and not part.isdigit())


def read_config_file(path: str) -> dict[str, object]:
    """The content of a YAML config file.

    Raises:
        ConfigFileError: If the file is missing, is not YAML, or holds something other than keys and values.
    """
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


def read_given(default_config: str | None, args: Sequence[str]) -> list[Given]:
    """Lists all that was given, in the order in which later overrides earlier.

    Args:
        default_config: The config file below all others.
        args: The arguments that follow the subcommand.

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


def _options(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options among the arguments, each with its value: ``--key value`` or ``--key=value``."""
    for position, arg in enumerate(args):
        if not re.match(r"--?[a-zA-Z]", arg):
            continue
        option, equals, value = arg.partition("=")
        following = args[position + 1] if position + 1 < len(args) else None
        yield option, value if equals else following


def _in_file(path: str, asked: bool) -> Iterator[Given]:
    for key, value in flatten(read_config_file(path)):
        yield Given(plain_key(key), value, path, asked)


def flatten(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested dicts and lists, each with its dotted key; an empty dict or list is a leaf."""
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
