"""What the parameter groups of a run are called in tags, whatever optimizer they are in."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch.optim import Optimizer


class LabelledGroup(NamedTuple):
    """A parameter group.

    Args:
        label: Its name, or ``group_<place>``; of equal ones the second is followed by ``-1``, the third by ``-2``, …
        optimizer: Whose group it is.
        place: Its index in the optimizer's ``param_groups``.
        group: The group.
    """

    label: str
    optimizer: Optimizer
    place: int
    group: dict[str, Any]


def group_label(place: int, group: dict[str, Any]) -> str:
    """Return the name of a group, or its place."""
    return str(group.get("name", f"group_{place}"))


def labelled_groups(optimizers: Iterable[Optimizer]) -> list[LabelledGroup]:
    """Return the groups of all optimizers that hold parameters, each under a label of its own."""
    labelled: list[LabelledGroup] = []
    seen: Counter[str] = Counter()
    for optimizer in optimizers:
        for place, group in enumerate(optimizer.param_groups):
            if group["params"]:
                label = group_label(place, group)
                number = f"-{seen[label]}" if seen[label] else ""
                seen[label] += 1
                labelled.append(LabelledGroup(f"{label}{number}", optimizer, place, group))
    return labelled
