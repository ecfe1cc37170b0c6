"""What to say of routes that are a guess: which they are, and the rules that settle them."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_muon.optim.routing.routes import Route

_SHOWN = 12
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def about_guesses(routes: Sequence[Route]) -> str:
    """Return which trained parameters are routed by a guess, and rules that settle it; empty where none is."""
    guesses = [route for route in routes if route.confidence == "guess" and route.algorithm != "frozen"]
    if not guesses:
        return ""
    patterns = _patterns(guesses, routes)
    count = f"{len(guesses)} parameters" if len(guesses) > 1 else "one parameter"
    lines = [f"the role of {count} is a guess:"]
    for pattern, members in list(patterns.items())[:_SHOWN]:
        first = members[0]
        what = pattern if len(members) == 1 else f"{pattern}, {len(members)} such as {first.name},"
        lines.append(f"  {first.algorithm} updates {what} {tuple(first.shape)}: {first.reason}")
    if len(patterns) > _SHOWN:
        lines.append(f"  and {len(patterns) - _SHOWN} more, which the rules below name")
    lines += [
        "Check each, and say with a rule what is right: adamw for an output head, a table and what is no matrix;",
        "muon for a hidden matrix, with layout=MatrixLayout(stacked=True) where it is a stack of them.",
        "As guessed, in Python",
        *(f'    Rule("{pattern}", "{members[0].algorithm}"),' for pattern, members in patterns.items()),
        "or in a configuration file",
        "    rules:",
        *(
            f"      - {{pattern: {json.dumps(pattern)}, algorithm: {members[0].algorithm}}}"
            for pattern, members in patterns.items()
        ),
    ]
    return "\n".join(lines)


def _patterns(guesses: Sequence[Route], routes: Sequence[Route]) -> dict[str, list[Route]]:
    """Return guesses by a pattern: with ``*`` for numbers, if that matches guesses for one algorithm only."""
    similar: defaultdict[str, list[Route]] = defaultdict(list)
    for guess in guesses:
        similar[_NUMBER.sub("*", guess.name)].append(guess)
    patterns: dict[str, list[Route]] = {}
    for pattern, members in similar.items():
        matched = [route for route in routes if fnmatchcase(route.name, pattern)]
        alike = all(route.confidence == "guess" and route.algorithm == members[0].algorithm for route in matched)
        if len(members) > 1 and alike:
            patterns[pattern] = members
        else:
            patterns |= {member.name: [member] for member in members}
    return patterns
