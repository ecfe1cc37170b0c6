"""Who does what in a step of a whole optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_muon.optim.parameter_group import matrix_layouts
from lightning_muon.optim.sharding.ownership import assign_owners
from lightning_muon.optim.sharding.rounds import Round, make_rounds
from lightning_muon.optim.sharding.sharding import Sharding


@dataclass(frozen=True)
class GroupPlan:
    """Say how the parameters of a group are updated, by their positions in it.

    Args:
        alone: Those for which this rank needs no other.
        rounds: The others, as they travel together.
    """

    alone: tuple[int, ...]
    rounds: tuple[Round, ...] = ()


def make_plans(
    groups: Sequence[Mapping[str, Any]], sharding_of: Callable[[Tensor], Sharding | None]
) -> list[GroupPlan]:
    """Plan the steps of an optimizer; all ranks come to the same plan without a word between them.

    Args:
        groups: Its parameter groups; the work is shared evenly over all of them.
        sharding_of: Tells the sharding of a parameter, None if this rank holds all of it alone.
    """
    shardings = [[sharding_of(p) if g["algorithm"] == "muon" else None for p in g["params"]] for g in groups]
    spread = [
        (sharding, layout)
        for group, of_group in zip(groups, shardings, strict=True)
        for sharding, layout in zip(of_group, matrix_layouts(group), strict=True)
        if sharding is not None
    ]
    units = iter(assign_owners(spread))
    plans = []
    for group, of_group in zip(groups, shardings, strict=True):
        travelling = [
            (index, (group["params"][index].device.type, group["params"][index].dtype), sharding, next(units))
            for index, sharding in enumerate(of_group)
            if sharding is not None
        ]
        plans.append(
            GroupPlan(
                alone=tuple(index for index, sharding in enumerate(of_group) if sharding is None),
                rounds=tuple(make_rounds(travelling, group["batch_elements"])),
            )
        )
    return plans
