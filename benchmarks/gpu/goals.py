"""What is expected of the numbers on a data-centre GPU. A goal that is not reached is reported, and no failure."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """A limit of one number.

    Args:
        text: What is expected.
        section: The section, ``what`` and column of the number.
        what: See there.
        column: See there.
        limit: The limit.
        at_least: Whether it is a lower limit; otherwise an upper one.
    """

    text: str
    section: str
    what: str
    column: str
    limit: float
    at_least: bool = False


_STEP = "whole step of GPT-2 small, × AdamW's"

GOALS = [
    Goal("optimizer step, times torch's speed", "step", "MuonAdamW", "times torch's speed", 3.0, at_least=True),
    Goal(f"{_STEP}, eager", "training", "eager model: MuonAdamW", "× AdamW's step", 1.02),
    Goal(f"{_STEP}, compiled", "training", "compiled model: MuonAdamW", "× AdamW's step", 1.02),
    Goal(
        "host syncs that the monitors add off cadence", "monitors", "host syncs of ten steps", "added, off cadence", 0
    ),
    Goal(
        "optimizer state with int8 momentum, × AdamW's",
        "memory",
        "MuonAdamW, int8 momentum",
        "× AdamW's state",
        0.30,
    ),
]


def reached(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each goal whose number was measured."""
    found = []
    for goal in GOALS:
        for row in rows:
            if row["section"] == goal.section and row["what"] == goal.what and goal.column in row:
                value = row[goal.column]
                is_reached = value >= goal.limit if goal.at_least else value <= goal.limit
                sign = "≥" if goal.at_least else "≤"
                found.append(
                    {
                        "goal": f"{goal.text}: {sign} {goal.limit:g}",
                        "measured": value,
                        "reached": "yes" if is_reached else "no",
                    }
                )
    return found
