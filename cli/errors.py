"""Errors as one line: what is wrong, where it stands, and the nearest thing that would be right."""

import ast
import inspect
import re
import typing
from argparse import Action, ArgumentParser
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_muon.cli.nearest import nearest
from lightning_muon.cli.sources import Given, plain_key

_UNKNOWN_OPTION = re.compile(r"(?:does not accept option|Option) '([^']+)'")
_CLASS_IN_MESSAGE = re.compile(r"class_path[= ]'([\w.]+)'")
_READABLE_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list",
    "list": "a list",
    "dict": "keys and values",
    "NoneType": "null",
}


def message_for_the_user(error: BaseException, packages: Iterable[str]) -> str | None:
    """The message of an error that tells the user what to change; ``None`` for one that reveals a bug.

    Args:
        error: Any exception.
        packages: Top-level packages whose own ``ValueError``, ``TypeError`` and ``FileNotFoundError`` count as told to
            the user when they are raised there, not further down in a library.
    """
    if isinstance(error, MisconfigurationException):
        return str(error)
    if not isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        return None
    place = _raised_in(error.__traceback__)
    if place == "jsonargparse" and error.__cause__:
        # It wraps what the constructor of a chosen class raises.
        return message_for_the_user(error.__cause__, packages)
    return str(error) if place in set(packages) else None


def _raised_in(traceback: TracebackType | None) -> str:
    """The top-level package of the innermost frame, or nothing."""
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")).split(".")[0] if traceback else ""


def explain(message: str, parser: ArgumentParser, given: Sequence[Given]) -> str:
    """Turns a message of the parser into one line that names the key and the nearest valid key or value.

    Args:
        message: What the parser said, in any of its forms.
        parser: The parser of the subcommand, or the main one when none was recognized.
        given: All that the user gave.
    """
    if "ubcommand" in message and ("invalid choice" in message or "was not provided" in message):
        return _explain_subcommand(message, parser)
    if "nterpolation" in message:
        return _explain_interpolation(message, parser, given)
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        if not match[1].startswith("-"):
            return f"unexpected argument '{match[1]}'; options are written --key value, and patterns of files in quotes"
        return _explain_unknown_key(match[1].lstrip("-").split("=")[0], message, parser, given)
    if match := _UNKNOWN_OPTION.search(message):
        return _explain_unknown_key(_key_path(message, match[1]), message, parser, given)
    if match := re.search(r"arguments are required: ([\w., ]+)", message):
        return _explain_missing(match[1], message, given)
    if match := re.search(r"argument --?([\w.]+)(?:/--\w+)?: expected (?:one|at least one) argument", message):
        return f"--{match[1]}: a value is missing after it"
    if _key_path(message):
        return _explain_value(message, parser, given)
    return message.splitlines()[0]


def _key_path(message: str, *further: str) -> str:
    """The full key that a message is about: the keys of the nested parsers, from the outside in."""
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    return ".".join([*keys, *further])


def _where(key: str, given: Sequence[Given]) -> str:
    """A phrase that names the file in which the key was given last, or nothing for the command line."""
    file = next((value.file for value in reversed(given) if _same_or_inside(value.key, key)), None)
    return f" (in {file})" if file else ""


def _same_or_inside(inner: str, outer: str) -> bool:
    return inner == plain_key(outer) or inner.startswith(f"{plain_key(outer)}.")


def _explain_subcommand(message: str, parser: ArgumentParser) -> str:
    choices = [name for action in parser._actions if isinstance(action.choices, dict) for name in action.choices]
    match = re.search(r"invalid choice: '([^']*)'", message)
    if not match:
        return f"a subcommand is missing: one of {', '.join(choices)}"
    suggestion = nearest(match[1], choices) or f"; expected one of {', '.join(choices)}"
    return f"unknown subcommand '{match[1]}'{suggestion}"


def _explain_interpolation(message: str, parser: ArgumentParser, given: Sequence[Given]) -> str:
    """An interpolation that leads nowhere, named as the user wrote it."""
    match = re.search(r"full_key: (\S+)", message)
    if not match:
        return message.splitlines()[0]
    key = re.sub(r"\[\d+\]", "", match[1].partition(".")[2])
    written = next((str(entry.value) for entry in reversed(given) if entry.key == plain_key(key)), None)
    target = re.search(r"\$\{([^}]*)\}", written or "")
    if not target:
        return f"{key}: {message.splitlines()[0]}{_where(key, given)}"
    known = [*_known_keys(parser), *(entry.key for entry in given if entry.key != plain_key(key))]
    return f"{key}: {written} leads to no key{_where(key, given)}{nearest(target[1], known)}"


def _explain_unknown_key(key: str, message: str, parser: ArgumentParser, given: Sequence[Given]) -> str:
    outer, _, name = key.rpartition(".")
    classes = _CLASS_IN_MESSAGE.findall(message)
    if classes and _find_action(parser, outer) is not None:
        valid = [f"{outer}.{argument}" for argument in _arguments_of(_import_class(classes[0]))]
        return f"unknown key '{outer}.{name}' for {classes[0]}{_where(key, given)}{nearest(key, valid)}"
    suggestion = nearest(key, _known_keys(parser)) or "; --help lists all keys"
    return f"unknown key '{key}'{_where(key, given)}{suggestion}"


def _explain_missing(missing: str, message: str, given: Sequence[Given]) -> str:
    outer = _key_path(message)
    names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in missing.replace(",", " ").split()]
    keys = ", ".join(f"--{outer}.{name}" if outer else f"--{name}" for name in names)
    classes = _CLASS_IN_MESSAGE.findall(message)
    owner = f" for {classes[-1]}" if outer and classes else ""
    return f"a value is missing{owner}: {keys}{_where(outer, given) if outer else ''}"


def _explain_value(message: str, parser: ArgumentParser, given: Sequence[Given]) -> str:
    key = _key_path(message)
    value = _given_value(key, message, given)
    where = _where(key, given)
    if match := re.search(r"No module named '([\w.]+)'", message):
        return f"{key}: cannot import {value}, there is no module '{match[1]}'{where}"
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return f"{key}: module {match[1]} has no {match[2]}{where}{nearest(match[2], dir(import_module(match[1])))}"
    if match := re.search(r"Multiple subclasses with name (\w+).*?ambiguity: ([\w., ]+)\.", message):
        return f"{key}: several classes are called {match[1]}, give the path of one{where}: {match[2]}"
    expected, choices = _expectations(message)
    if "import path" in message and not {"a number", "a whole number", "a text"} & set(expected):
        choices += _class_names(_annotation(parser, key, message))
        expected = ["a class by its name or import path", *(phrase for phrase in expected if phrase == "true or false")]
    wanted = f": expected {' or '.join(dict.fromkeys(expected))}" if expected else " is not valid here"
    return f"{key}{wanted}, got {value!r}{where}{nearest(str(value), choices)}"


def _given_value(key: str, message: str, given: Sequence[Given]) -> object:
    written = [entry.value for entry in given if entry.key in {plain_key(key), f"{plain_key(key)}.class_path"}]
    if written:
        return written[-1]
    match = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value|$)", message, re.MULTILINE)
    return match[1] if match else "this value"


def _expectations(message: str) -> tuple[list[str], list[str]]:
    """What the parser would have taken, in words, and the choices among which the nearest may be meant."""
    words: list[str] = []
    choices: list[str] = []
    for expected in re.findall(r"Expected an? (?:typing\.)?(Literal\[.*?\]|<class '[\w.]+'>)", message):
        if expected.startswith("Literal"):
            choices += [str(choice) for choice in ast.literal_eval(expected.removeprefix("Literal"))]
        else:
            name = expected.removeprefix("<class '").removesuffix("'>")
            words.append(_READABLE_TYPES.get(name, name))
    if choices:
        words.insert(0, "one of " + ", ".join(dict.fromkeys(choices)))
        # A choice among numbers is reported as "a whole number" when the value is none.
        redundant = {"null", "a whole number"} if any(choice.isdigit() for choice in choices) else {"null"}
        words = [word for word in words if word not in redundant]
    return words, choices


def _find_action(parser: ArgumentParser, key: str) -> Action | None:
    return next((action for action in parser._actions if action.dest == key), None)


def _known_keys(parser: ArgumentParser) -> list[str]:
    """All keys of a subcommand, with those of the classes that are chosen by default left to their own messages."""
    return [action.dest for action in parser._actions if action.option_strings and action.dest != "help"]


def _annotation(parser: ArgumentParser, key: str, message: str) -> object:
    """The type that a key is declared with, in the signature of the module, the trainer or a class chosen by name."""
    action = _find_action(parser, key)
    if action is not None:
        return getattr(action, "_typehint", None)
    classes = _CLASS_IN_MESSAGE.findall(message)
    if not classes:
        return None
    hints = typing.get_type_hints(vars(_import_class(classes[-1])).get("__init__"))
    return hints.get(key.rpartition(".")[2])


def _class_names(annotation: object) -> list[str]:
    """Short names of all known classes that an annotation admits, or makes, if it is a callable."""
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        if annotation.__module__ == "builtins":
            return []
        return [cls.__name__ for cls in _with_subclasses(annotation)]
    parts = typing.get_args(annotation)
    if parts and isinstance(parts[0], list):  # Callable[[...], made]
        parts = parts[1:]
    return [name for part in parts for name in _class_names(part)]


def _with_subclasses(cls: type) -> Iterable[type]:
    yield cls
    subclasses: list[type] = type.__subclasses__(cls)
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _import_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    imported: type = getattr(import_module(module), name)
    return imported


def _arguments_of(cls: type) -> list[str]:
    """Names of what a class takes, those that it passes on to its parents included."""
    names: list[str] = []
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}][1:]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names
