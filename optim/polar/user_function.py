"""Functions of the user in place of a name: given as such or by import path."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any


def resolve_function(value: object, argument: str, names: Iterable[str]) -> Callable[..., Any]:
    """Return the function that an argument gives, as such or by its import path ``"package.module.function"``.

    Args:
        value: The function, or its import path.
        argument: What the function is for; the name of the argument in errors.
        names: What the argument may be instead.

    Raises:
        ValueError: If ``value`` is neither, or cannot be imported.
    """
    if callable(value):
        return value
    known = ", ".join(names)
    if not isinstance(value, str):
        raise ValueError(f"{argument} must be one of {known}, or a function or the import path of one; got {value!r}")
    module, dot, attribute = value.rpartition(".")
    if not dot:
        near = get_close_matches(value, list(names), n=1)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {argument} {value!r}; choose one of {known}, or give an import path{suggestion}")
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"{argument} {value!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"{argument} {value!r} is not a function, but {type(function).__name__}")
    resolved: Callable[..., Any] = function
    return resolved


def name_of(function: Callable[..., Any]) -> str:
    """Return the import path of a function, or what it prints where it has none."""
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}.{name}" if name else repr(function)


def check_keywords(function: Callable[..., Any], argument: str, options: Mapping[str, Any]) -> None:
    """Check the options that a function of one positional argument is to get by name.

    Raises:
        ValueError: If the function does not take one of the ``options``, or needs one that is missing.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # functions of C, such as torch's own, need not have a signature
        return
    if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        parameters = parameters[1:]
    by_name = [p for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        check_names(argument, [p.name for p in by_name], options)
    for p in parameters:
        if p.default is p.empty and p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL} and p.name not in options:
            raise ValueError(f"{argument} needs a value for {p.name!r}; give it in its options")


def check_names(argument: str, known: Iterable[str], options: Iterable[str]) -> None:
    """Raise a ValueError for the first option that is not among the known ones."""
    for option in options:
        if option not in known:
            raise ValueError(f"{argument} has no option {option!r}; it takes {', '.join(known) or 'none'}")
