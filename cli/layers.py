"""The layers of a run: the default config, then each option and each config file of the command line.

The classes of module and data are chosen from them before there is a parser; what is passed to it is settled then.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import yaml

from lightning_muon.cli.config_files import find_config, load_yaml, parse_config, read_config_file, text_of

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
    return [*(_of_file(file, asked=False) for file in (*default_configs[:1], *presets)), *layers]


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
