"""Config files, read as YAML; refused where a key would be lost, or a value would be repeated without end."""

import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import yaml

from lightning_muon.cli.errors.suggestions import nearest, nearest_path

# A config of the largest models has a thousand values in ten levels. Aliases in a few lines may stand for billions.
MOST_VALUES = 100_000
MOST_LEVELS = 50

_SECTIONS = ("trainer", "model", "data")


class ConfigFileError(ValueError):
    """A config file that is missing or cannot be read; the message is one line for the user."""


def read_config_file(path: str) -> dict[str, object]:
    """Return what a config file says, interpolations unresolved; nothing if all of it is commented out.

    Sections without any key, such as a ``trainer:`` whose lines are commented out, are left out.

    Raises:
        ConfigFileError: If it cannot be read, or is not a config. The message names the file, the line and the key.
    """
    file, what = Path(path), f"config file '{path}'"
    try:
        if path and file.is_dir():
            raise ConfigFileError(f"{what} is a folder: give a file in it{nearest_path(file / '*', '*.y*ml')}")
        if file.is_symlink() and not file.exists():
            raise ConfigFileError(f"{what} is a link to a file that does not exist")
        if not file.exists() or not path:
            raise ConfigFileError(f"{what} does not exist{nearest_path(file, '*.y*ml') if path else ''}")
        if not file.is_file():
            raise ConfigFileError(f"{what} is not a file on a disk, which can be read twice")
        return parse_config(text_of(file), what)
    except UnicodeDecodeError as error:
        hint = ": a checkpoint goes to --ckpt_path" if zipfile.is_zipfile(file) else " in UTF-8"
        raise ConfigFileError(f"{what} is not a text file{hint}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigFileError):
            raise
        raise ConfigFileError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_config(text: str, what: str) -> dict[str, object]:
    """Return what a config says.

    Args:
        text: In YAML.
        what: How to call it in messages.

    Raises:
        ConfigFileError: If it is not a config.
    """
    content = load_yaml(text, what)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigFileError(f"{what} holds no keys: expected lines such as 'trainer:' or 'model:'")
    for key in content:
        if not isinstance(key, str):
            raise ConfigFileError(f"{what}: the key {key!r} is not a text: expected keys such as 'trainer' or 'model'")
    content = {key: value for key, value in content.items() if not (key in _SECTIONS and value is None)}
    for key in _SECTIONS:
        value = content.get(key, {})
        is_class = isinstance(value, str) and key != "trainer"
        if not (isinstance(value, dict) or is_class):
            raise ConfigFileError(f"{what}: expected keys and values below '{key}:', got {value!r}")
    trainer = content.get("trainer", {})
    if isinstance(trainer, dict):
        for key in ("callbacks", "callbacks+"):
            _check_entries(trainer.get(key), f"trainer.{key.rstrip('+')}", what)
    return content


def load_yaml(text: str, what: str) -> object:
    """Return the value of a YAML text.

    Raises:
        ConfigFileError: If it is not YAML; if a key stands twice in one place, of which YAML would drop the first; if
            an anchor contains itself; if aliases multiply it beyond ``MOST_VALUES``, or it has too many levels.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Graph(what).measure(node)
            value: object = loader.construct_document(node)
            return value
        finally:
            loader.dispose()
    except RecursionError as error:
        raise ConfigFileError(f"{what} has more than {MOST_LEVELS} levels") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not a YAML file"
        raise ConfigFileError(f"{what}{where}: {problem}") from error
    except ValueError as error:  # such as a date that there is not
        raise error if isinstance(error, ConfigFileError) else ConfigFileError(f"{what}: {error}") from error


def find_config(config: str, default_config: str | None = None) -> str:
    """Return the file that ``--config`` names: a path, or a preset by its name, such as ``optimizer/moonlight``.

    Presets are looked up in the folder of the default config, in ``configs``, and among those of this package.

    Raises:
        ConfigFileError: If there is no such preset, but one of a similar name.
    """
    try:
        if not config or Path(config).exists() or Path(config).is_absolute():
            return config
        folders = _preset_folders(default_config)
        for file in (folder / f"{config.removesuffix('.yaml')}.yaml" for folder in folders):
            if file.is_file():
                return _shown(file)
    except (OSError, ValueError):  # no such name can be that of a file
        return config
    presets = [str(file.relative_to(folder).with_suffix("")) for folder in folders for file in folder.rglob("*.yaml")]
    if not Path(config).suffix and (suggestion := nearest(config, presets)):
        raise ConfigFileError(f"config file '{config}' does not exist{suggestion}")
    return config


def text_of(file: Path) -> str:
    """Return the text of a config file."""
    return file.read_text(encoding="utf-8").removeprefix("\ufeff")  # which some editors write first


def _preset_folders(default_config: str | None) -> list[Path]:
    # Beside the rooms there is `configs`, in this package's repository and where it is installed.
    of_package = Path(__file__).resolve().parents[1] / "configs"
    return [*([Path(default_config).parent] if default_config else []), Path("configs"), of_package]


def _shown(file: Path) -> str:
    """Return a path as short as it can be written from here."""
    with suppress(ValueError):
        return str(file.resolve().relative_to(Path.cwd()))
    return str(file)


class _Graph:
    """Measures the tree that a YAML text stands for, on the graph of its nodes, in which aliases are shared."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._measured: dict[int, tuple[int, int] | None] = {}  # None: it is being measured

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """Return how many values a node stands for, and in how many levels."""
        if id(node) in self._measured:
            known = self._measured[id(node)]
            if known is None:
                raise self._error(node, "what the anchor here names contains itself")
            return known
        self._measured[id(node)] = None
        count, levels = 1, 1
        for child in self._children(node):
            values, depth = self.measure(child)
            count, levels = count + values, max(levels, depth + 1)
        if count > MOST_VALUES:
            raise self._error(node, f"its aliases stand for more than {MOST_VALUES} values")
        if levels > MOST_LEVELS:
            raise self._error(node, f"it has more than {MOST_LEVELS} levels")
        self._measured[id(node)] = count, levels
        return count, levels

    def _children(self, node: yaml.Node) -> Iterator[yaml.Node]:
        if isinstance(node, yaml.SequenceNode):
            yield from node.value
        elif isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()
            for key, value in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in seen and name != ("tag:yaml.org,2002:merge", "<<"):
                    raise self._error(key, f"the key '{key.value}' stands twice: join what is below it")
                if name:
                    seen.add(name)
                yield value

    def _error(self, node: yaml.Node, problem: str) -> ConfigFileError:
        return ConfigFileError(f"{self._what}, line {node.start_mark.line + 1}: {problem}")


def _check_entries(entries: object, key: str, what: str) -> None:
    """Refuse an entry of a list of classes that names no class."""
    for number, entry in enumerate(entries if isinstance(entries, list) else (), start=1):
        class_path = entry.get("class_path") if isinstance(entry, dict) else entry
        if isinstance(class_path, str) and class_path:
            continue
        if isinstance(entry, dict):
            given = f", only {', '.join(map(str, entry))}" if entry else ""
            problem = f"has no class_path{given}: begin it with 'class_path: ' and the name of a class"
        else:
            problem = f"is {entry!r}: expected 'class_path: ' and the name of a class"
        raise ConfigFileError(f"{what}: entry {number} of {key} {problem}")
