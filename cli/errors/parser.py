"""Errors of the parser as one line: what is wrong, which file it is in, and the nearest valid key or value."""

import ast
import inspect
import re
import typing
from argparse import Action, ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pkgutil import resolve_name

from lightning.pytorch.strategies import StrategyRegistry
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_muon.cli.errors.interpolation import explain_interpolation, explain_written
from lightning_muon.cli.errors.missing import for_another_class
from lightning_muon.cli.errors.suggestions import nearest, nearest_key
from lightning_muon.cli.given import Given, place_of, plain_key

_UNKNOWN_OPTION = re.compile(r"(?:does not accept option|Option) '([^']+)'")
# The second form is that of older versions of jsonargparse, such as 4.47.
_REQUIRED = re.compile(
    r"arguments are required: ([\w., ]*\w)(?:\. Got value|$)|Option '([\w.]+)' is required", re.MULTILINE
)
_CLASS_IN_MESSAGE = re.compile(r"class_path[= ]'([\w.]+)'")
# What presets of the optimizer set, with the annotation of the argument.
_OF_THE_OPTIMIZER = {
    "optimizer": "OptimizerCallable = MuonAdamW",
    "lr_scheduler": "LRSchedulerCallable | None = None",
    "lr_by_role": "dict[str, float] | None = None",
    "per_head": "bool = False",
    "rules": "list[Rule] | None = None",
    "strict_routing": "bool = False",
}
# The package and the extra of the modules that presets name.
_EXTRAS = {"pytorch_optimizer": ("pytorch-optimizer", "baselines")}
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


def explain(message: str, parser: ArgumentParser, given: Sequence[Given], classes: Mapping[str, str]) -> str:
    """Return one line for a message of the parser, with the key and the nearest valid key or value.

    Args:
        message: The parser's message, in any of its forms.
        parser: The parser of the subcommand, or the main one if no subcommand was recognized.
        given: What the user gave.
        classes: The import paths of module and data, by section, where they were chosen.
    """
    if "ubcommand" in message and ("invalid choice" in message or "was not provided" in message):
        return _explain_subcommand(message, parser)
    if line := explain_written(given):
        return line
    if "nterpolation" in message:
        key = plain_key(_key_path(message))
        return explain_interpolation(message, [*_known_keys(parser), *_other_keys(key, given)], given)
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        if not match[1].startswith("-"):
            return f"unexpected argument '{match[1]}'; options are written --key value, and patterns of files in quotes"
        key = _key_path(message, match[1].lstrip("-").split("=")[0])
        return _explain_unknown_key(key, message, parser, given, classes)
    if match := _REQUIRED.search(message):
        return _explain_missing(match[1] or match[2], message, given, classes)
    if (match := _UNKNOWN_OPTION.search(message)) and f'Parser key "{match[1]}"' not in message:
        return _explain_unknown_key(_key_path(message, match[1]), message, parser, given, classes)
    if match := re.search(r"argument (?:-\w/)?--([\w.]+)\S*: expected (?:one|at least one) argument", message):
        return f"--{match[1]}: a value is missing after it"
    if _key_path(message):
        return _explain_value(message, parser, given)
    return message.splitlines()[0]


def check_strategy(strategy: object, given: Sequence[Given]) -> None:
    """Refuse an unknown name of a strategy; the parser accepts any text.

    Raises:
        ValueError: With the known names. Of a family such as ``ddp``, ``ddp_spawn``, …, only the first is listed.
    """
    names = ["auto", *StrategyRegistry.available_strategies()]
    if not isinstance(strategy, str) or strategy.lower() in names:
        return
    stems = [name for name in names if not any(name.startswith(f"{other}_") for other in names)]
    # Low enough for the name of a strategy's class.
    suggestion = nearest(strategy.rpartition(".")[2], names, similarity=0.55)
    where = place_of("trainer.strategy", given)
    raise ValueError(f"trainer.strategy: expected one of {', '.join(stems)}, got {strategy!r}{where}{suggestion}")


def _key_path(message: str, *further: str) -> str:
    """Return the full key that a message is about: the keys of the nested parsers, from the outside in."""
    keys = dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message))
    return ".".join([*keys, *further])


def _explain_subcommand(message: str, parser: ArgumentParser) -> str:
    choices = [name for action in parser._actions if isinstance(action.choices, dict) for name in action.choices]
    match = re.search(r"invalid choice: '([^']*)'", message)
    if not match:
        return f"a subcommand is missing: one of {', '.join(choices)}"
    suggestion = nearest(match[1], choices) or f"; expected one of {', '.join(choices)}"
    return f"unknown subcommand '{match[1]}'{suggestion}"


def _explain_unknown_key(
    key: str, message: str, parser: ArgumentParser, given: Sequence[Given], chosen: Mapping[str, str]
) -> str:
    section, *names = key.split(".")
    if (
        section == "model"
        and names[:1]
        and names[0] in _OF_THE_OPTIMIZER
        and not _find_action(parser, f"model.{names[0]}")
    ):
        return _explain_no_optimizer(names[0], given, chosen.get("model", "the module"))
    outer = key.rpartition(".")[0]
    while outer and _find_action(parser, outer) is None:
        outer = outer.rpartition(".")[0]
    everywhere = [*_known_keys(parser), *_other_keys(key, given)]
    classes = [path for path in _CLASS_IN_MESSAGE.findall(message) if inspect.isclass(resolve_name(path))]
    if outer and not classes and _CLASS_IN_MESSAGE.search(message):
        return f"{key}: {outer} has no class{place_of(key, given)}: give its class_path, or --{outer} and a name"
    if classes and outer:
        valid = [f"{outer}.{argument}" for argument in _arguments_of(resolve_name(classes[0]))]
        suggestion = nearest_key(key, valid, everywhere, classes[0].rpartition(".")[2])
        return f"unknown key '{key}' for {classes[0]}{place_of(key, given)}{suggestion}"
    owner = f" for {chosen[section]}" if section in chosen else ""
    return f"unknown key '{key}'{owner}{place_of(key, given)}{nearest_key(key, everywhere, everywhere)}"


def _explain_no_optimizer(argument: str, given: Sequence[Given], module: str) -> str:
    """Return what to do where a preset of the optimizer meets a module that makes its own."""
    annotation = _OF_THE_OPTIMIZER[argument]
    return (
        f"model.{argument}{place_of(f'model.{argument}', given)} is set, but {module} has no argument '{argument}', and"
        f" makes its optimizer itself: add '{argument}: {annotation}' to its __init__ and use it in"
        " configure_optimizers, or leave configure_optimizers out and MuonAdamW is made for it"
    )


def _explain_missing(missing: str, message: str, given: Sequence[Given], chosen: Mapping[str, str]) -> str:
    outer = _key_path(message)
    names = [re.sub(r"^(fit|validate|test|predict|routes)\.", "", name) for name in missing.replace(",", " ").split()]
    keys = [f"{outer}.{name}" if outer else name for name in names]
    classes = _CLASS_IN_MESSAGE.findall(message)
    section = (outer or names[0]).partition(".")[0]
    owner = f" for {classes[-1]}" if outer and classes else (f" for {chosen[section]}" if section in chosen else "")
    place = place_of(outer, given) if outer else ""
    options = ", ".join(f"--{key}" for key in keys)
    return f"a value is missing{owner}: {options}{place}{for_another_class(list(map(plain_key, keys)), given)}"


def _explain_value(message: str, parser: ArgumentParser, given: Sequence[Given]) -> str:
    key = _key_path(message)
    value = _refused_value(key, message, given)
    where = place_of(key, given)
    if match := re.search(r"No module named '([\w.]+)'", message):
        package, extra = _EXTRAS.get(match[1], ("", ""))
        install = f": pip install {package}, or with the extra '{extra}'" if extra else ""
        return f"{key}: cannot import {value}, there is no module '{match[1]}'{where}{install}"
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
    if expected == ["null"]:
        expected = ["a class that can stand here, or null"]
    wanted = f": expected {' or '.join(dict.fromkeys(expected))}" if expected else " is not valid here"
    return f"{key}{wanted}, got {value!r}{where}{nearest(str(value), choices, similarity)}"


def _innermost_reason(message: str) -> str:
    """Return the lines about the innermost key; the lines around them are about classes that were not chosen."""
    start = message.rfind('Parser key "')
    lines = message[start:].splitlines()
    line_start = message[:start].rpartition("\n")[2]
    indent = len(line_start) - len(line_start.lstrip())
    after = next(
        (at for at, line in enumerate(lines) if at and line and len(line) - len(line.lstrip()) <= indent), len(lines)
    )
    return "\n".join(lines[:after])


def _refused_value(key: str, message: str, given: Sequence[Given]) -> object:
    written = [entry.value for entry in given if entry.key in {plain_key(key), f"{plain_key(key)}.class_path"}]
    match = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value|$)", message, re.MULTILINE)
    if not written:
        return match[1] if match else "this value"
    # Where a key was given several times, as for callbacks, the message names the refused one.
    named = {*re.findall(r"Expected a dot import path string: (.*)", message), match[1] if match else ""}
    return next((value for value in reversed(written) if str(value) in named), written[-1])


def _expectations(message: str) -> tuple[list[str], list[str]]:
    """Return what the parser accepts, in words, and the choices among which the nearest may be meant."""
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
        # Of Literal[1, 2] | int the parser reports both.
        redundant = {"null", "a whole number"} if any(choice.isdigit() for choice in choices) else {"null"}
        words = [word for word in words if word not in redundant]
    return words, choices


def _find_action(parser: ArgumentParser, key: str) -> Action | None:
    return next((action for action in parser._actions if action.dest == key), None)


def _known_keys(parser: ArgumentParser) -> list[str]:
    """Return all keys of a subcommand, without those of chosen classes."""
    keys = [action.dest for action in parser._actions if action.option_strings]
    return [key for key in keys if key.rpartition(".")[2] not in {"help", "print_config"}]


def _other_keys(key: str, given: Sequence[Given]) -> list[str]:
    """Return the other keys that were given; they include keys of the classes that the default config chooses."""
    return [entry.key for entry in given if entry.key != key and not entry.key.endswith("class_path")]


def _annotation(parser: ArgumentParser, key: str, message: str) -> object:
    """Return the declared type of a key of the module, the trainer, or a class chosen by name."""
    action = _find_action(parser, key)
    if action is not None:
        return getattr(action, "_typehint", None)
    classes = _CLASS_IN_MESSAGE.findall(message[: message.rfind('Parser key "')])
    if not classes:
        return None
    hints = typing.get_type_hints(vars(resolve_name(classes[-1])).get("__init__"))
    return hints.get(key.rpartition(".")[2])


def _class_names(annotation: object) -> list[str]:
    """Return the short names of all known classes that an annotation accepts, or that its callable returns."""
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        return [] if annotation.__module__ == "builtins" else [cls.__name__ for cls in _with_subclasses(annotation)]
    parts = typing.get_args(annotation)
    if parts and isinstance(parts[0], list):  # Callable[[...], returned]
        parts = parts[1:]
    return [name for part in parts for name in _class_names(part)]


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    subclasses: list[type] = type.__subclasses__(cls)
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _arguments_of(cls: type) -> list[str]:
    """Return the names of the arguments that the user gives, including those passed on to parents by ``**kwargs``."""
    names: list[str] = []
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}][1:]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    # The module passes the first argument of these: the parameters, or the optimizer.
    return names[1:] if issubclass(cls, (Optimizer, LRScheduler)) else names
