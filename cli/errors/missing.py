"""Arguments without a default and without a type, which the parser passes as null when nobody gives them."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from lightning_muon.cli.errors.suggestions import listed
from lightning_muon.cli.given import Given, plain_key


def check_complete(key: str, value: object, given: Sequence[Given]) -> None:
    """Refuse a class, or a class among its arguments, whose arguments are incomplete.

    Args:
        key: The key of the value, such as ``"model"``.
        value: A configuration as plain values. Where it chooses a class, it has ``class_path`` and ``init_args``.
        given: What the user gave.

    Raises:
        ValueError: For the first such class, with the missing options.
    """
    # As null, or by an interpolation. Other values were for the class before.
    asked = {entry.key for entry in given if entry.value in (None, "null") or "${" in str(entry.value)}
    for at, spec in _classes(key, value):
        missing = [name for name in _untyped(spec["class_path"]) if spec["init_args"].get(name, 0) is None]
        options = [f"{plain_key(at)}.{name}" for name in missing]
        if options := [option for option in options if option not in asked]:
            missing = [f"--{name}" for name in options]
            what = listed(f"a value is missing for {spec['class_path']}:", missing)
            raise ValueError(f"{what}{for_another_class(options, given)}")


def for_another_class(keys: Sequence[str], given: Sequence[Given]) -> str:
    """Return a phrase about the config file that gives one of the missing values to the class before."""
    files = (entry.file for entry in reversed(given) if entry.key in keys and entry.file)
    file = next(files, None)
    return f"; the value in {file} is for another class" if file else ""


def _classes(key: str, value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str) and isinstance(value.get("init_args"), Mapping):
            yield key, value
        for name, child in value.items():
            yield from _classes(f"{key}.{name}", child)
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _classes(f"{key}.{number}", child)


def _untyped(path: str) -> Iterator[str]:
    """Yield the names of the arguments of a class or function that have neither a default nor an annotation."""
    made: Any = resolve_name(path)
    parents = made.__mro__ if inspect.isclass(made) else ()
    for maker in [vars(parent)["__init__"] for parent in parents if "__init__" in vars(parent)] or [made]:
        parameters = inspect.signature(maker).parameters.values()
        for parameter in parameters:
            named = parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
            if named and parameter.default is parameter.empty and parameter.annotation is parameter.empty:
                yield parameter.name
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return  # what it does not pass on are no arguments
