"""The classes of module and data, chosen before there is a parser: its options are then those of these classes.

``--model my.Module``, or ``model: {class_path: my.Module, init_args: …}`` in a config, or else the program's own class.
Keys below ``model:`` are arguments of the chosen class, with or without ``init_args``. Of a section that was written
for another class, such as ``model:`` of the default config, those arguments stay that the chosen class has too.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse import class_from_function as class_of_function  # type: ignore[attr-defined]
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_muon.cli.added_optimizer import with_optimizer
from lightning_muon.cli.errors.suggestions import nearest
from lightning_muon.cli.given import INTERPOLATION, Given, given_in, plain_key
from lightning_muon.cli.layers import SECTIONS, Layer, flatten

Maker = Callable[..., Any]  # a class, or a function that returns an object of one

_INIT_ARGS = re.compile(rf"\$\{{({'|'.join(SECTIONS)})\.(?:init_args|dict_kwargs)\.")
_PARTS_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs"}


@dataclass(frozen=True)
class Choice:
    """What a section of the config is for.

    Attributes:
        section: ``"model"`` or ``"data"``.
        own: The program's own class, if it has one.
        made: The class to train or to read from; ``None`` if nobody has chosen, or the module has data of its own.
        left_out: Keys of the default config that the chosen class does not take.
        free: Names of arguments that were given below ``dict_kwargs``, for a class whose ``**kwargs`` have no names.
    """

    section: str
    own: Maker | None
    made: Maker | None
    left_out: list[str] = field(default_factory=list, compare=False)
    free: list[str] = field(default_factory=list, compare=False)

    @property
    def path(self) -> str | None:
        """The import path of the class, if it is not the program's own."""
        return None if self.made is None or self.made is self.own else path_of(self.made)

    @cached_property
    def arguments(self) -> list[str]:
        """The names of the arguments, including those that are passed on to parents."""
        made = self.for_parser
        if made is None:
            return []
        parser = ArgumentParser(exit_on_error=False)
        names = parser.add_class_arguments(as_class(made), self.section, fail_untyped=False, sub_configs=True)
        return [name.removeprefix(f"{self.section}.") for name in names]

    @cached_property
    def for_parser(self) -> Maker | None:
        """The class whose arguments the parser takes: a module that makes no optimizer gets one."""
        return with_optimizer(self.made) if self.section == "model" and self.made is not None else self.made


@dataclass(frozen=True)
class Choices:
    """What is trained, and on which data."""

    model: Choice
    data: Choice

    def __iter__(self) -> Iterator[Choice]:
        return iter((self.model, self.data))

    @property
    def left_out(self) -> list[str]:
        """Keys of the default config that the chosen classes do not take."""
        return [key for choice in self for key in choice.left_out]

    def add_free_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments to a parser that has those of the classes."""
        for choice in self:
            for name in dict.fromkeys(choice.free):
                parser.add_argument(f"--{choice.section}.{name}", type=Any)

    def nested(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration that says which classes it is for, where these are not the program's own.

        Args:
            tree: The arguments of the classes directly below their sections.
        """
        nested = dict(tree)
        for choice in self:
            if choice.path is not None:
                arguments = tree.get(choice.section) or {}  # a class without arguments has no section
                named = {name: value for name, value in arguments.items() if name not in choice.free}
                free = {name: value for name, value in arguments.items() if name in choice.free}
                nested[choice.section] = {"class_path": choice.path, "init_args": named}
                if free:
                    nested[choice.section]["dict_kwargs"] = free
        return nested

    @property
    def paths(self) -> dict[str, str]:
        """The import paths of the classes that are not the program's own, by section."""
        return {choice.section: choice.path for choice in self if choice.path is not None}


def choose(
    layers: Sequence[Layer],
    model: Maker | str | None,
    data: Maker | str | None,
    of_model: type = LightningModule,
) -> Choices:
    """Choose the classes: those that were given last, or else the program's own.

    A module with a ``train_dataloader`` of its own has its data with it, unless other data were asked for. ``--data
    null`` asks for none.

    Args:
        layers: What was given.
        model: The program's own module, or its import path.
        data: The program's own data, likewise.
        of_model: What a class of ``model`` must be.

    Raises:
        ValueError: If there is no such class, or it cannot stand there; with its key and file.
    """
    given = given_in(layers)
    model, data = (resolve_name(own) if isinstance(own, str) else own for own in (model, data))
    module = _chosen("model", model, of_model, given)
    reader = _chosen("data", data, LightningDataModule, given)
    asked = any(entry.asked and entry.key.partition(".")[0] == "data" for entry in given)
    if _has_data(module) and module is not model and not asked:
        reader = None
    return Choices(Choice("model", model, module), Choice("data", data, reader))


def settle(layers: Sequence[Layer], choices: Choices) -> list[Layer]:
    """Return layers without the choice of classes, as the parser of the chosen ones takes them."""
    settled: list[Layer] = []
    for layer in layers:
        if layer.content is not None:
            settled.append(layer.saying(_settled(layer, choices)))
        elif (option := _settled_option(layer, choices)) is not None:
            settled.append(option)
    return settled


def as_class(made: Maker) -> type:
    """Return a class with the arguments of a function, for the parser; a class as it is."""
    return made if inspect.isclass(made) else class_of_function(made)


def path_of(made: Maker) -> str:
    """Return the import path of a class or function."""
    return f"{made.__module__}.{made.__qualname__}"


def _chosen(section: str, own: Maker | None, base: type, given: Sequence[Given]) -> Maker | None:
    names = [
        entry for entry in given if entry.key in {section, f"{section}.class_path"} and isinstance(entry.value, str)
    ]
    path = str(names[-1].value) if names else ""
    if not path or "${" in path:
        return own
    if section == "data" and path == "null":
        return None
    where = f" (in {names[-1].file})" if names[-1].file else ""
    made = _imported(path, base, section, where)
    returned = made if inspect.isclass(made) else inspect.signature(made).return_annotation
    if not inspect.isclass(returned) or not issubclass(returned, base):
        hint = ""
        if inspect.isclass(returned) and issubclass(returned, nn.Module) and own is not None:
            hint = f"; --{section}.net {path} trains a network in {getattr(own, '__name__', own)}"
        raise ValueError(f"{section}: expected a {base.__name__}, got {path!r}{where}{hint}")
    return made


def _imported(path: str, base: type, section: str, where: str) -> Maker:
    """Return the class of an import path, or of a short name if its module is imported."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        known = {path_of(kind): kind for kind in _subclasses(base) if kind.__name__ == path}
        if len(known) == 1:
            return next(iter(known.values()))
        if known:
            raise ValueError(
                f"{section}: several classes are called {path}, give the path of one{where}: {', '.join(known)}"
            )
        suggestion = nearest(path, [kind.__name__ for kind in _subclasses(base)], similarity=0.75)
        raise ValueError(
            f"{section}: expected a class by its import path, such as my_package.my_module.MyClass, got {path!r}"
            f"{where}{suggestion}"
        )
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # `python -m` puts it there, a script or a console command does not
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{section}: cannot import {path}, there is no module '{error.name}'{where}") from error
    made: Any = getattr(module, name, None)
    if made is None:
        raise ValueError(f"{section}: module {module_name} has no {name}{where}{nearest(name, dir(module))}")
    if not callable(made):
        raise ValueError(f"{section}: expected a class that can stand here, got {path!r}{where}")
    return made  # type: ignore[no-any-return]


def _subclasses(kind: type) -> Iterator[type]:
    subclasses: list[type] = type.__subclasses__(kind)
    for each in subclasses:
        yield each
        yield from _subclasses(each)


def _has_data(module: Maker | None) -> bool:
    return (
        inspect.isclass(module)
        and issubclass(module, LightningModule)
        and module.train_dataloader is not LightningModule.train_dataloader
    )


def _settled(layer: Layer, choices: Choices) -> dict[str, object]:
    content = {key: _direct(value) for key, value in (layer.content or {}).items()}
    left_out: set[str] = set()
    for choice in choices:
        section = content.get(choice.section)
        if isinstance(section, str) and choice.made and "${" not in section:
            section = {"class_path": section}
        if not isinstance(section, dict):
            continue
        written_for = section.get("class_path", None if layer.asked else choice.own and path_of(choice.own))
        if choice.made is None and (layer.asked or choice.own is None):
            continue  # nobody has chosen: the parser says what is missing
        arguments = _arguments(section)
        choice.free.extend(section.get("dict_kwargs") or {})
        if written_for is not None and not _names(written_for, choice.made):
            accepted = choice.arguments
            left_out |= {f"{choice.section}.{name}" for name in arguments if name not in accepted}
            arguments = {name: value for name, value in arguments.items() if name in accepted}
        content[choice.section] = arguments
    _leave_out_what_leads_there(content, left_out)
    if not layer.asked:
        for choice in choices:
            choice.left_out[:] = sorted(key for key in left_out if key.partition(".")[0] == choice.section)
    return {key: value for key, value in content.items() if value != {} or key not in SECTIONS}


def _arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {key: value for key, value in section.items() if key not in _PARTS_OF_A_CLASS}
    for part in ("init_args", "dict_kwargs"):
        arguments |= section.get(part) or {}
    return arguments


def _leave_out_what_leads_there(content: dict[str, Any], left_out: set[str]) -> None:
    """Leave out the arguments whose interpolations lead to what is left out; they are added to it."""
    while left_out:
        further = {
            (section, name)
            for section in SECTIONS
            for name, value in _mapping(content.get(section)).items()
            if any(
                plain_key(target) == key or plain_key(target).startswith(f"{key}.")
                for _, leaf in flatten(value)
                for target in INTERPOLATION.findall(str(leaf))
                for key in left_out
            )
        }
        if not further:
            return
        for section, name in further:
            content[section] = {key: value for key, value in content[section].items() if key != name}
            left_out.add(f"{section}.{name}")


def _settled_option(layer: Layer, choices: Choices) -> Layer | None:
    """Return an option of the command line; ``None`` for one that chooses a class."""
    section, _, key = layer.option.lstrip("-").partition(".")
    choice = next((choice for choice in choices if choice.section == section), None)
    args = tuple(str(_direct(arg)) for arg in layer.args)
    if choice is None or not (choice.made or choice.own):
        return replace(layer, args=args)
    if key in {"", "class_path"} and layer.value:
        return None
    if key.startswith("dict_kwargs."):
        choice.free.append(key.split(".")[1])
    args = (re.sub(rf"^(--{section})\.(?:init_args|dict_kwargs)\.", r"\1.", args[0]), *args[1:])
    return replace(layer, args=args)


def _direct(node: Any) -> Any:
    """Return values in which ``${model.init_args.dim}`` is ``${model.dim}``."""
    if isinstance(node, Mapping):
        return {key: _direct(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_direct(value) for value in node]
    return _INIT_ARGS.sub(r"${\1.", node) if isinstance(node, str) else node


def _names(path: str, made: Maker | None) -> bool:
    """Return whether a path, or a short name, is that of a class; it may be imported from another place."""
    if made is None:
        return False
    if path in {path_of(made), made.__name__}:
        return True
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None) is made


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
