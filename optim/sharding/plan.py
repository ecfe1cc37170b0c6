"""Who does what in a step of a whole optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_muon.optim.muon_update import batch_bound, bounded
from lightning_muon.optim.parameter_group import matrix_layouts
from lightning_muon.optim.sharding.dtensor import is_dtensor, is_sharded_by_rows
from lightning_muon.optim.sharding.kept_state import Kept
from lightning_muon.optim.sharding.ownership import Loads, Unit, assign_owners
from lightning_muon.optim.sharding.rounds import Round, make_rounds
from lightning_muon.optim.sharding.sharding import Range, Sharding, chunks


@dataclass(frozen=True)
class GroupPlan:
    """Say how the parameters of a group are updated, by their positions in it.

    Args:
        alone: Those for which this rank needs no other.
        redistributed: Those of Muon that are not sharded by rows, which all ranks gather.
        rounds: Those of Muon that go to the owners of their matrices and back, as they travel together.
        kept_rounds: Those of Muon whose owner also keeps their state, so that they only come from there.
        kept_packs: Those of AdamW of which each rank keeps a part of the state, as they travel together.
        kept: Of which elements each rank keeps the state, for those whose state is shared out.
    """

    alone: tuple[int, ...]
    redistributed: tuple[int, ...] = ()
    rounds: tuple[Round, ...] = ()
    kept_rounds: tuple[Round, ...] = ()
    kept_packs: tuple[tuple[int, ...], ...] = ()
    kept: Mapping[int, Kept] = field(default_factory=dict)


def make_plans(
    groups: Iterable[Mapping[str, Any]],
    sharding_of: Callable[[Tensor], Sharding | None],
    shares_state: Callable[[Tensor], bool],
) -> list[GroupPlan]:
    """Plan the steps of an optimizer; all ranks come to the same plan without a word between them.

    The work is shared evenly over all groups. A group that comes later changes nothing for those before it, so that
    state stays where it is.

    Args:
        groups: Its parameter groups.
        sharding_of: Tells the sharding of a parameter, None if this rank holds all of it alone.
        shares_state: Tells whether the ranks that all hold a parameter keep but a share of its state each.
    """
    loads: Loads = defaultdict(list)
    return [
        _of_muon(group, sharding_of, shares_state, loads)
        if group["algorithm"] == "muon"
        else _of_adamw(group, sharding_of, shares_state)
        for group in groups
    ]


def _of_muon(
    group: Mapping[str, Any],
    sharding_of: Callable[[Tensor], Sharding | None],
    shares_state: Callable[[Tensor], bool],
    loads: Loads,
) -> GroupPlan:
    params, layouts = group["params"], matrix_layouts(group)
    redistributed = tuple(i for i, param in enumerate(params) if is_dtensor(param) and not is_sharded_by_rows(param))
    shardings = {
        i: sharding
        for i, param in enumerate(params)
        if i not in redistributed and (sharding := sharding_of(param)) is not None
    }
    units = dict(zip(shardings, assign_owners([(s, layouts[i]) for i, s in shardings.items()], loads), strict=True))
    kept = {
        i: Kept(s, _owned_ranges(units[i], len(s.ranges)))
        for i, s in shardings.items()
        if s.replicated and shares_state(params[i])
    }

    def rounds(members: Iterable[int]) -> tuple[Round, ...]:
        travelling = [(i, params[i], shardings[i], units[i]) for i in members]
        return tuple(make_rounds(travelling, group["batch_elements"]))

    return GroupPlan(
        alone=tuple(i for i in range(len(params)) if i not in shardings and i not in redistributed),
        redistributed=redistributed,
        rounds=rounds(i for i in shardings if i not in kept),
        kept_rounds=rounds(kept),
        kept=kept,
    )


def _of_adamw(
    group: Mapping[str, Any], sharding_of: Callable[[Tensor], Sharding | None], shares_state: Callable[[Tensor], bool]
) -> GroupPlan:
    """Element by element it does not matter where a parameter lives, unless its state lives elsewhere."""
    kept = {
        i: Kept(sharding, tuple((chunk,) for chunk in chunks(sharding.shape.numel(), sharding.group.size())))
        for i, param in enumerate(group["params"])
        if (sharding := sharding_of(param)) is not None and sharding.replicated and shares_state(param)
    }
    alone = tuple(i for i in range(len(group["params"])) if i not in kept)
    return GroupPlan(alone, kept_packs=tuple(_packs(group, kept)), kept=kept)


def _owned_ranges(units: Sequence[Unit], ranks: int) -> tuple[tuple[Range, ...], ...]:
    return tuple(
        tuple((unit.start, unit.start + unit.numel) for unit in units if unit.owner == rank) for rank in range(ranks)
    )


def _packs(group: Mapping[str, Any], kept: Mapping[int, Kept]) -> Iterator[tuple[int, ...]]:
    """Put parameters of one dtype together, up to ``batch_elements``; one too large goes alone."""
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for index, of_parameter in kept.items():
        param = group["params"][index]
        alike[of_parameter.sharding.group, param.device.type, param.dtype].append(index)
    params = group["params"]
    for members in alike.values():
        most_elements = batch_bound(group["batch_elements"], params[members[0]].device)
        yield from map(tuple, bounded(members, lambda index: params[index].numel(), most_elements))
