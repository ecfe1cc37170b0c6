"""The plan of a step: which rank owns which matrices, and in which way each parameter of a group is updated."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_muon.optim.sharding.buckets import Bucket, make_buckets
from lightning_muon.optim.sharding.dtensor import dtensor_sharding, is_dtensor, is_sharded_by_rows
from lightning_muon.optim.sharding.sharding import Range, Sharding, Unit, chunks, cut_into_units
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.sharding.zero1 import StateShares
from lightning_muon.optim.update.matrix_layout import MatrixLayout, matrix_layouts
from lightning_muon.optim.update.muon import batch_bound, bounded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Loads = defaultdict["ProcessGroup", list[int]]


@dataclass(frozen=True)
class GroupPlan:
    """How the parameters of a group are updated, by their positions in it.

    Args:
        here: Those that this rank updates without any other.
        layouts: Where the matrices of each parameter of a muon group are.
        fans: Fan-out and fan-in of these matrices; of those of the first shape, if they have several.
        everywhere: Those of Muon that are not sharded by rows, which all ranks gather.
        buckets: Those of Muon that travel to the owners of their matrices and back, bucket by bucket.
        zero1_buckets: Those of Muon whose owner also has their state: only their steps travel.
        zero1_packs: Those of AdamW whose state is shared out, as their weights travel together.
        shares: The elements whose state each rank has, for the last two.
        has_dtensors: Whether a parameter is a DTensor.
    """

    here: tuple[int, ...]
    layouts: Sequence[MatrixLayout] = ()
    fans: Sequence[tuple[int, int]] = ()
    everywhere: tuple[int, ...] = ()
    buckets: tuple[Bucket, ...] = ()
    zero1_buckets: tuple[Bucket, ...] = ()
    zero1_packs: tuple[tuple[int, ...], ...] = ()
    shares: Mapping[int, StateShares] = field(default_factory=dict)
    has_dtensors: bool = False


def make_plans(
    groups: Iterable[Mapping[str, Any]], shardings: Mapping[Tensor, Sharding], *, shard_state: bool
) -> list[GroupPlan]:
    """Plan the steps of an optimizer: deterministic, the same on all ranks, without communication.

    The work is distributed evenly over all groups. A group that is added later does not change the plans of those
    before it, so their state stays where it is.

    Args:
        groups: The parameter groups of the optimizer.
        shardings: The shardings of parameters that are distributed over ranks and are no DTensors.
        shard_state: Whether the ranks that replicate parameters (DDP) share out their state.
    """
    loads: Loads = defaultdict(list)
    plans = []
    for group in groups:
        distributed = _distributed(group["params"], shardings)
        shared = [i for i, s in distributed.items() if shard_state and _is_from_ddp(group["params"][i], s)]
        if group["algorithm"] == "muon":
            plans.append(_plan_muon(group, distributed, shared, loads))
        else:
            plans.append(_plan_adamw(group, distributed, shared))
    return plans


def _distributed(params: Sequence[Tensor], shardings: Mapping[Tensor, Sharding]) -> dict[int, Sharding]:
    """Return, by position, the shardings of parameters that are distributed over several ranks as flat ranges."""
    found = {}
    for index, param in enumerate(params):
        if is_dtensor(param):
            sharding = dtensor_sharding(param) if is_sharded_by_rows(param) else None
        else:
            sharding = shardings.get(param)
        if sharding is not None and sharding.group.size() > 1:
            found[index] = sharding
    return found


def _is_from_ddp(param: Tensor, sharding: Sharding) -> bool:
    """Return whether DDP has made a sharding: FSDP2 and FSDP1 may replicate parameters too."""
    return sharding.replicated and not is_dtensor(param) and not is_flattened(param)


def assign_owners(parameters: Sequence[tuple[Sharding, MatrixLayout]], loads: Loads) -> list[tuple[Unit, ...]]:
    """Cut parameters into units and assign each unit to a rank of its group.

    Units that are whole on one rank stay there. The others are assigned, most expensive first, to the rank with the
    smallest load. This depends only on shapes and shardings, so all ranks find the same result. ``loads`` are the costs
    that the ranks of each group have already; the new costs are added.
    """
    units = [cut_into_units(sharding, layout) for sharding, layout in parameters]
    travelling: list[tuple[int, int]] = []
    for index, (sharding, _) in enumerate(parameters):
        load = loads[sharding.group] = loads[sharding.group] or [0] * len(sharding.ranges)
        for number, unit in enumerate(units[index]):
            if unit.owner >= 0:
                load[unit.owner] += unit.cost
            else:
                travelling.append((index, number))
    travelling.sort(key=lambda place: -units[place[0]][place[1]].cost)
    for index, number in travelling:
        unit, load = units[index][number], loads[parameters[index][0].group]
        owner = load.index(min(load))
        load[owner] += unit.cost
        units[index][number] = replace(unit, owner=owner)
    return [tuple(of_parameter) for of_parameter in units]


def _plan_muon(
    group: Mapping[str, Any], shardings: Mapping[int, Sharding], shared: Sequence[int], loads: Loads
) -> GroupPlan:
    params, layouts = group["params"], matrix_layouts(group)
    everywhere = tuple(i for i, param in enumerate(params) if is_dtensor(param) and not is_sharded_by_rows(param))
    units = dict(zip(shardings, assign_owners([(s, layouts[i]) for i, s in shardings.items()], loads), strict=True))

    def owned(index: int, rank: int) -> tuple[Range, ...]:
        return tuple((unit.start, unit.start + unit.numel) for unit in units[index] if unit.owner == rank)

    def buckets(members: Iterable[int]) -> tuple[Bucket, ...]:
        travelling = [(i, params[i], shardings[i], units[i]) for i in members]
        return tuple(make_buckets(travelling, group["batch_elements"]))

    shapes = [shardings[i].shape if i in shardings else param.shape for i, param in enumerate(params)]
    ranks = {i: range(len(shardings[i].ranges)) for i in shared}
    return GroupPlan(
        here=tuple(i for i in range(len(params)) if i not in shardings and i not in everywhere),
        layouts=layouts,
        fans=[layout.fans(shape)[0] for layout, shape in zip(layouts, shapes, strict=True)],
        everywhere=everywhere,
        buckets=buckets(i for i in shardings if i not in shared),
        zero1_buckets=buckets(shared),
        shares={i: StateShares(shardings[i], tuple(owned(i, rank) for rank in ranks[i])) for i in shared},
        has_dtensors=any(map(is_dtensor, params)),
    )


def _plan_adamw(group: Mapping[str, Any], shardings: Mapping[int, Sharding], shared: Sequence[int]) -> GroupPlan:
    """Plan an adamw group: its update is element-wise, so only shared-out state needs other ranks."""
    params = group["params"]
    shares = {}
    for i in shared:
        cut = chunks(params[i].numel(), len(shardings[i].ranges))
        shares[i] = StateShares(shardings[i], tuple((chunk,) for chunk in cut))
    return GroupPlan(
        here=tuple(i for i in range(len(params)) if i not in shares),
        zero1_packs=tuple(_packs(group, shares)),
        shares=shares,
        has_dtensors=any(map(is_dtensor, params)),
    )


def _packs(group: Mapping[str, Any], shares: Mapping[int, StateShares]) -> Iterator[tuple[int, ...]]:
    """Pack parameters of one dtype, up to ``batch_elements``; a larger one is a pack by itself."""
    params = group["params"]
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for index, shared in shares.items():
        alike[shared.sharding.group, params[index].device.type, params[index].dtype].append(index)
    for members in alike.values():
        most_elements = batch_bound(group["batch_elements"], params[members[0]].device)
        yield from map(tuple, bounded(members, lambda index: params[index].numel(), most_elements))
