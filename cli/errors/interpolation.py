"""Errors of interpolations such as ``${model.dim}``: their syntax, circles, keys that there are not, and resolvers."""

import re
from collections.abc import Sequence

from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from lightning_muon.cli.errors.suggestions import nearest_key
from lightning_muon.cli.given import INTERPOLATION, Given, place_of, plain_key

_FORMS = "write ${model.dim} for the value of a key, or ${oc.env:NAME} for a variable of the environment"


def explain_written(given: Sequence[Given]) -> str | None:
    """Return one line for the first value whose interpolation cannot be read, or that refers to itself.

    It is meant for values that were refused: the text alone does not show which entry of a list a key is of.

    Args:
        given: What the user gave.
    """
    last = {entry.key: entry for entry in given}
    for entry in last.values():
        if "${" not in str(entry.value):
            continue
        where = f" (in {entry.file})" if entry.file else ""
        try:
            parse(str(entry.value))
        except GrammarParseError:
            return f"{entry.key}: '{entry.value}' is no interpolation{where}: {_FORMS}"
        if circle := _circle(entry.key, last):
            return f"{entry.key}: {entry.value} leads back to itself{where}: {' → '.join(circle)}"
    return None


def explain_interpolation(message: str, keys: Sequence[str], given: Sequence[Given]) -> str:
    """Return one line for a message of OmegaConf about an interpolation that leads nowhere.

    Args:
        message: OmegaConf's message.
        keys: The keys that may be meant.
        given: What the user gave.
    """
    first = message.splitlines()[0].partition(" raised while resolving interpolation")
    problem = "it cannot be resolved" if first[1] else first[0]
    if first[0] == "DataValueError":  # of ${from_data:…}; it names what is wrong in the data
        return message.partition("resolving interpolation: ")[2].partition("\n    full_key:")[0]
    match = re.search(r"full_key: (\S+)", message)
    if not match:
        return problem
    key = re.sub(r"\[\d+\]", "", match[1].partition(".")[2])
    entry = next((entry for entry in reversed(given) if entry.key == plain_key(key)), None)
    written = "" if entry is None else str(entry.value)
    where = place_of(key, given)
    if match := re.search(r"Environment variable '([^']*)' not found", message):
        return f"{key}: {written}: the environment has no variable '{match[1]}'{where}"
    if match := re.search(r"Unsupported interpolation type (\S+)", message):
        return f"{key}: {written}: there is no '{match[1]}:'{where}; {_FORMS}"
    target = INTERPOLATION.search(written)
    if not target:
        return f"{key}: {f'{written}: ' if written else ''}{problem}{where}"
    return f"{key}: {written} leads to no key{where}{nearest_key(target[1], keys, keys)}"


def _circle(start: str, last: dict[str, Given]) -> list[str] | None:
    """Return the keys from one to itself or to one above it, as interpolations lead; ``None`` without a circle."""
    paths = [[start]]
    seen = {start}
    while paths:
        path = paths.pop()
        for name in INTERPOLATION.findall(str(last[path[-1]].value)):
            target = plain_key(name)
            if start == target or start.startswith(f"{target}."):
                return [*path, target]
            if target in last and target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return None
