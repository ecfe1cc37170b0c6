"""Errors of the parser as one line: what is wrong, where it stands, and the nearest thing that would be right."""

import ast
import inspect
import re
import typing
from argparse import Action, ArgumentParser
from collections.abc import Iterable, Sequence
from importlib import import_module

from lightning.pytorch.strategies import StrategyRegistry
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_muon.cli.nearest import nearest, nearest_key
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
        return _explain_unknown_key(_key_path(message, match[1].lstrip("-").split("=")[0]), message, parser, given)
    if (match := _UNKNOWN_OPTION.search(message)) and f'Parser key "{match[1]}"' not in message:
        return _explain_unknown_key(_key_path(message, match[1]), message, parser, given)
    if match := re.search(r"arguments are required: ([\w., ]+)", message):
        return _explain_missing(match[1], message, given)
    if match := re.search(r"argument --?([\w.]+)(?:/--\w+)?: expected (?:one|at least one) argument", message):
        return f"--{match[1]}: a value is missing after it"
    if _key_path(message):
        return _explain_value(message, parser, given)
    return message.splitlines()[0]


def check_strategy(strategy: object, given: Sequence[Given]) -> None:
    """Refuse a name that is no strategy's, which the parser takes for any text.

    Raises:
        ValueError: With the names that there are; of one with variants, such as ``ddp_spawn``, the name itself.
    """
    names = ["auto", *StrategyRegistry.available_strategies()]
    if not isinstance(strategy, str) or strategy.lower() in names:
        return
    stems = [name for name in names if not any(name.startswith(f"{other}_") for other in names)]
    # Low enough for the name of a strategy's class.
    suggestion = nearest(strategy.rpartition(".")[2], names, similarity=0.55)
    where = _where("trainer.strategy", given)
    raise ValueError(f"trainer.strategy: expected one of {', '.join(stems)}, got {strategy!r}{where}{suggestion}")


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
    known = [*_known_keys(parser), *_other_keys(plain_key(key), given)]
    return f"{key}: {written} leads to no key{_where(key, given)}{nearest_key(target[1], known, known)}"


def _explain_unknown_key(key: str, message: str, parser: ArgumentParser, given: Sequence[Given]) -> str:
    outer = key.rpartition(".")[0]
    while outer and _find_action(parser, outer) is None:
        outer = outer.rpartition(".")[0]
    everywhere = [*_known_keys(parser), *_other_keys(key, given)]
    classes = _CLASS_IN_MESSAGE.findall(message)
    if classes and outer:
        valid = [f"{outer}.{argument}" for argument in _arguments_of(_import_class(classes[0]))]
        suggestion = nearest_key(key, valid, everywhere, classes[0].rpartition(".")[2])
        return f"unknown key '{key}' for {classes[0]}{_where(key, given)}{suggestion}"
    return f"unknown key '{key}'{_where(key, given)}{nearest_key(key, everywhere, everywhere)}"


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
    reason = _innermost_reason(message)
    expected, choices = _expectations(reason)
    similarity = 0.6
    if "import path" in reason and not {"a number", "a whole number", "a text"} & set(expected):
        choices += _class_names(_annotation(parser, key, message))
        similarity = 0.75  # many are called Something-Monitor or Something-LR
        expected = ["a class by its name or import path", *(phrase for phrase in expected if phrase == "true or false")]
    wanted = f": expected {' or '.join(dict.fromkeys(expected))}" if expected else " is not valid here"
    return f"{key}{wanted}, got {value!r}{where}{nearest(str(value), choices, similarity)}"


def _innermost_reason(message: str) -> str:
    """The lines about the innermost key: around them is why the classes that were not chosen do not do either."""
    start = message.rfind('Parser key "')
    lines = message[start:].splitlines()
    line_start = message[:start].rpartition("\n")[2]
    indent = len(line_start) - len(line_start.lstrip())
    after = next(
        (at for at, line in enumerate(lines) if at and line and len(line) - len(line.lstrip()) <= indent), len(lines)
    )
    return "\n".join(lines[:after])


def _given_value(key: str, message: str, given: Sequence[Given]) -> object:
    written = [entry.value for entry in given if entry.key in {plain_key(key), f"{plain_key(key)}.class_path"}]
    match = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value|$)", message, re.MULTILINE)
    # Of several, such as callbacks, the parser names the one that it does not take.
    named = {*re.findall(r"Expected a dot import path string: (.*)", message), match[1] if match else ""}
    if written:
        return next((value for value in reversed(written) if str(value) in named), written[-1])
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
    keys = [action.dest for action in parser._actions if action.option_strings]
    return [key for key in keys if key.rpartition(".")[2] not in {"help", "print_config"}]


def _other_keys(key: str, given: Sequence[Given]) -> list[str]:
    """The keys that were given besides this one, such as those of the classes that the default config chooses."""
    return [entry.key for entry in given if entry.key != key and not entry.key.endswith("class_path")]


def _annotation(parser: ArgumentParser, key: str, message: str) -> object:
    """The type that a key is declared with, in the signature of the module, the trainer or a class chosen by name."""
    action = _find_action(parser, key)
    if action is not None:
        return getattr(action, "_typehint", None)
    classes = _CLASS_IN_MESSAGE.findall(message[: message.rfind('Parser key "')])
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
    """Names of what a class takes from the user, those that it passes on to its parents included."""
    names: list[str] = []
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}][1:]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    # The module gives these their first argument: the parameters, or the optimizer.
    return names[1:] if issubclass(cls, (Optimizer, LRScheduler)) else names
