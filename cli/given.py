"""What the user wrote, key by key and with its place: the text of config files and command line, before parsing.

The parser returns final values. Two questions need the text: which file an error is in, and whether a value was asked
for or is a default.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_muon.cli.config_files import CONFIG_OPTIONS, is_inline, load_yaml, parse_config, read_config_file

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


def default_files(default_config: str | Path | Sequence[str | Path] | None) -> list[str]:
    """Return the default config files: the base, and presets to lay over it."""
    if default_config is None:
        return []
    return [str(file) for file in ([default_config] if isinstance(default_config, str | Path) else default_config)]


def without_replaced(default_configs: Sequence[str], args: Sequence[str]) -> list[str]:
    """Return the default configs without the presets in whose place the command line has others.

    A preset of the optimizer says only what it changes. Laid over another, it would get the options of both.

    Args:
        default_configs: The base, which always stays, and presets.
        args: The arguments after the subcommand. A ``--config`` takes the place of the presets in its folder.
    """
    configs = [value for option, value in _options(args) if option in CONFIG_OPTIONS and value and not is_inline(value)]
    replaced = {Path(config).resolve().parent for config in configs}
    return [
        *default_configs[:1],
        *(file for file in default_configs[1:] if Path(file).resolve().parent not in replaced),
    ]


def read_given(default_configs: Sequence[str], args: Sequence[str]) -> list[Given]:
    """List all given values; later ones override earlier ones.

    Args:
        default_configs: The config files below all others.
        args: The arguments after the subcommand.

    Raises:
        ConfigFileError: If one of the config files cannot be read, or an anchor in a value contains itself.
    """
    given = [entry for file in default_configs for entry in _entries(read_config_file(file), file, asked=False)]
    for option, value in _options(args):
        if option not in CONFIG_OPTIONS:
            if value and "&" in value and "*" in value:
                load_yaml(value, option)  # an anchor, and an alias of it
            given.append(Given(plain_key(option.lstrip("-")), value, None, asked=True))
        elif value is not None and is_inline(value):
            given.extend(_entries(parse_config(value, "the text of --config"), None, asked=True))
        elif value is not None:
            given.extend(_entries(read_config_file(value), value, asked=True))
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


def _entries(content: dict[str, object], file: str | None, asked: bool) -> Iterator[Given]:
    for key, value in flatten(content):
        yield Given(plain_key(key), value, file, asked)
