"""The layers of a run: the default config, then each option and each config file of the command line.

The classes of module and data are chosen from them before there is a parser; what is passed to it is settled then.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import yaml

from lightning_muon.cli.config_files import (
    ConfigFileError,
    find_config,
    load_yaml,
    parse_config,
    read_config_file,
    text_of,
)

CONFIG_OPTIONS = {"-c", "--config"}
SECTIONS = ("model", "data")

_OPTION = re.compile(r"--?[a-zA-Z]")


@dataclass(frozen=True)
class Layer:
    """One layer; later ones lie above earlier ones.

    Attributes:
        args: The arguments that stand for it.
        content: What a config says, interpolations unresolved; ``None`` for another option.
        file: The config file, or ``None`` for the command line.
        asked: ``False`` for the default config, ``True`` for what the user has added.
    """

    args: tuple[str, ...]
    content: dict[str, object] | None = None
    file: str | None = None
    asked: bool = True

    @classmethod
    def of(cls, content: dict[str, object], file: str | None = None, *, asked: bool = True) -> "Layer":
        """Return a layer that says what a config says, whatever its file has."""
        text = yaml.safe_dump(content, default_flow_style=True, width=sys.maxsize, sort_keys=False)
        return cls((f"--config={text.strip()}",), content, file, asked)

    @property
    def option(self) -> str:
        """The option, such as ``--trainer.max_steps``; an empty string for a value that stands by itself."""
        option = self.args[0].partition("=")[0]
        return option if _OPTION.match(option) else ""

    @property
    def value(self) -> str | None:
        """The value of the option, if it is among the arguments."""
        _, equals, value = self.args[0].partition("=")
        return value if equals else (self.args[1] if len(self.args) > 1 else None)

    def saying(self, content: dict[str, object]) -> "Layer":
        """Return this config with another content."""
        return self if content == self.content else Layer.of(content, self.file, asked=self.asked)


def default_files(default_config: str | Path | Sequence[str | Path] | None) -> list[str]:
    """Return the default config files: the base, and presets to lay over it."""
    if default_config is None:
        return []
    return [str(file) for file in ([default_config] if isinstance(default_config, str | Path) else default_config)]


def read_layers(default_configs: Sequence[str], args: Sequence[str]) -> list[Layer]:
    """Read the default configs, and the arguments after the subcommand with their config files.

    Args:
        default_configs: The config files below all others: the base, and presets. A ``--config`` may name a file of
            the base's folder, and takes the place of the default presets in its folder: a preset of the optimizer says
            only what it changes; laid over another, it would get the options of both.
        args: The arguments after the subcommand.

    Raises:
        ConfigFileError: If one of the config files cannot be read, or an anchor in a value contains itself.
    """
    base = default_configs[0] if default_configs else None
    layers: list[Layer] = []
    rest = list(args)
    while rest:
        layer = Layer((rest.pop(0),))
        takes_value = layer.option in {*CONFIG_OPTIONS, *(f"--{section}" for section in SECTIONS)}
        if takes_value and layer.value is None and rest and not _OPTION.match(rest[0]):
            layer = Layer((*layer.args, rest.pop(0)))
        layers.append(_read(layer, base) if takes_value and layer.value is not None else layer)
    for layer, value in options(layers):
        if value and "&" in value and "*" in value:
            load_yaml(value, layer.option)  # an anchor, and an alias of it
    replaced = {Path(layer.file).resolve().parent for layer in layers if layer.file}
    presets = (file for file in default_configs[1:] if Path(file).resolve().parent not in replaced)
    defaults = (_of_file(file, asked=False) for file in (*default_configs[:1], *presets))
    return [*defaults, *_behind_their_classes(layers)]


def options(layers: Sequence[Layer]) -> Iterator[tuple[Layer, str | None]]:
    """Yield each option that is no config, with its value, written ``--key value`` or ``--key=value``."""
    for layer, following in zip_longest(layers, layers[1:]):
        if layer.content is None and layer.option:
            yield layer, following.args[0] if layer.value is None and following else layer.value


def _read(layer: Layer, default_config: str | None) -> Layer:
    """Read the config that an option names or holds; ``--model`` may also name a class."""
    value, section = str(layer.value), layer.option.lstrip("-")
    inline = value.lstrip().startswith("{")
    what = f"the text of {layer.option}"
    if layer.option in CONFIG_OPTIONS:
        if inline:
            return Layer.of(parse_config(value, what))
        return _of_file(find_config(value, default_config), asked=True)
    if inline:
        return Layer.of({section: load_yaml(value, what)})
    if value.endswith((".yaml", ".yml", ".json")):
        return Layer.of({section: read_config_file(value)})
    return layer


def _of_file(file: str, *, asked: bool) -> Layer:
    content = read_config_file(file)
    written = yaml.safe_load(text_of(Path(file)))
    # The parser takes no empty files and sections.
    return Layer((f"--config={file}",), written, file, asked).saying(content)


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


@dataclass(frozen=True, eq=False)
class _Said:
    """A config, or an option with its value.

    Attributes:
        layers: As they were read.
        option: The key that the option sets; an empty string for a config.
        classes: The keys that are set to a text, which may name a class.
        content: The keys that a config says, or an option of the form ``--key {…}``.
    """

    layers: list[Layer]
    option: str
    classes: set[str]
    content: set[str]

    def is_said_by(self, keys: set[str]) -> bool:
        """Return whether later keys override the option."""
        inner = () if self.option in self.classes else (key for key in keys if key.startswith(f"{self.option}."))
        return self.option in keys or f"{self.option}.class_path" in keys or any(inner)


def _behind_their_classes(layers: Sequence[Layer]) -> list[Layer]:
    """Return layers with each option behind the last class that it may be an argument of.

    ``--model.optimizer.lr 0.1 --model.optimizer AdamW`` is a rate of AdamW, as in the other order; if AdamW had no such
    argument, the parser would say so. Of an option and a later config that says the same, the config stays.
    """
    said = list(_said(layers))
    options = [one for one in reversed(said) if one.option]
    # The outer ones first: a class may itself be an argument of another.
    for one in sorted(options, key=lambda one: one.option.count(".")):
        at = said.index(one)
        ends = [end for end, other in enumerate(said) if any(one.option.startswith(f"{key}.") for key in other.classes)]
        end = max([at, *ends])
        later = {key for other in said[at + 1 : end + 1] for key in other.content}
        if end > at:
            said.remove(one)
            if not one.is_said_by(later):
                said.insert(end, one)
    return [layer for one in said for layer in one.layers]


def _said(layers: Sequence[Layer]) -> Iterator[_Said]:
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and layer.content is None and not layer.option:
            groups[-1].append(layer)  # a value
        else:
            groups.append([layer])
    for group in groups:
        first, *values = group
        value: object = first.content
        if first.content is None:
            text = values[0].args[0] if first.value is None and values else first.value
            with suppress(ConfigFileError):
                value = load_yaml(text or "", first.option)
        key = "" if first.content is not None else first.option.lstrip("-")
        entries = {_without_init_args(at): leaf for at, leaf in flatten(value, key)}
        yield _Said(
            group,
            _without_init_args(key).removesuffix(".class_path"),
            {at.removesuffix(".class_path") for at, leaf in entries.items() if isinstance(leaf, str)},
            set(entries) if isinstance(value, dict) else set(),
        )


def _without_init_args(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in {"init_args", "dict_kwargs"})
