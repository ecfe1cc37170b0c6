"""The plan of a step: which rank owns which matrices, and in which way each parameter is updated."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_muon.optim.sharding.buckets import Bucket, Piece, make_buckets
from lightning_muon.optim.sharding.dtensor import dtensor_sharding, is_dtensor, is_sharded_by_rows
from lightning_muon.optim.sharding.pieces import NeuronPieces
from lightning_muon.optim.sharding.sharding import Range, Sharding, Unit, chunks, cut_into_units
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.sharding.zero1 import StateShares
from lightning_muon.optim.update.batches import batch_bound, bounded
from lightning_muon.optim.update.matrix_layout import MatrixLayout, matrix_layouts
from lightning_muon.optim.update.normuon import Neurons, NeuronsOfParts
from lightning_muon.optim.update.options import Algorithm, alike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Loads = defaultdict["ProcessGroup", list[int]]


@dataclass(frozen=True)
class Plan:
    """How the parameters of groups with alike options are updated together.

    The other fields mention parameters by their positions in ``members``.

    Args:
        algorithm: ``"muon"`` or ``"adamw"``.
        groups: Positions of the parameter groups in the optimizer.
        members: The parameters of these groups, as the position of a group and a position in it.
        here: Those that this rank updates without any other.
        layouts: Where the matrices of each parameter of Muon are.
        fans: Fan-out and fan-in of these matrices.
        everywhere: Those of Muon that are not sharded by rows, which all ranks gather.
        buckets: Those of Muon that travel to the owners of their matrices and back, bucket by bucket.
        zero1_buckets: Those of Muon whose owner also has their state: only their steps travel.
        zero1_packs: Those of AdamW whose state is shared out, as their weights travel together.
        shares: The elements whose state each rank has, for the last two.
        neurons: With ``neuron_beta``, the neurons of which this rank has a number, for each parameter.
        has_dtensors: Whether a parameter is a DTensor.
    """

    algorithm: Algorithm
    groups: tuple[int, ...]
    members: tuple[tuple[int, int], ...]
    here: tuple[int, ...]
    layouts: Sequence[MatrixLayout] = ()
    fans: Sequence[tuple[int, int]] = ()
    everywhere: tuple[int, ...] = ()
    buckets: tuple[Bucket, ...] = ()
    zero1_buckets: tuple[Bucket, ...] = ()
    zero1_packs: tuple[tuple[int, ...], ...] = ()
    shares: Mapping[int, StateShares] = field(default_factory=dict)
    neurons: Sequence[Neurons | NeuronPieces | NeuronsOfParts] = ()
    has_dtensors: bool = False


@dataclass(frozen=True)
class _Planned:
    """A parameter of a plan: its place in the groups, and its units where Muon updates it on several ranks."""

    place: tuple[int, int]
    param: Tensor
    layout: MatrixLayout
    sharding: Sharding | None
    units: tuple[Unit, ...]
    shared: bool


def make_plans(
    groups: Sequence[Mapping[str, Any]], shardings: Mapping[Tensor, Sharding], *, shard_state: bool
) -> list[Plan]:
    """Plan the steps of an optimizer: deterministic, the same on all ranks, without communication.

    Groups whose options are :func:`alike` are updated together, so that more groups take no more collectives. The work
    is distributed evenly over all groups. A group that is added later does not change the owners of matrices in those
    before it, so their state stays where it is.

    Args:
        groups: The parameter groups of the optimizer.
        shardings: The shardings of parameters that are distributed over ranks and are no DTensors.
        shard_state: Whether the ranks that replicate parameters (DDP) share out their state.
    """
    loads: Loads = defaultdict(list)
    families: defaultdict[Any, list[_Planned]] = defaultdict(list)
    for number, group in enumerate(groups):
        params, is_muon = group["params"], group["algorithm"] == "muon"
        layouts = matrix_layouts(group)
        distributed = _distributed(params, shardings)
        units = assign_owners([(s, layouts[i]) for i, s in distributed.items()], loads) if is_muon else []
        units_of = dict(zip(distributed, units, strict=is_muon))
        families[alike(group)] += [
            _Planned(
                (number, i),
                param,
                layouts[i],
                distributed.get(i),
                units_of.get(i, ()),
                shard_state and i in distributed and _is_from_ddp(param, distributed[i]),
            )
            for i, param in enumerate(params)
        ]
    plans = []
    for members in families.values():
        numbers = tuple(dict.fromkeys(member.place[0] for member in members))
        group = groups[numbers[0]]
        plan = (_plan_muon if group["algorithm"] == "muon" else _plan_adamw)(numbers, members, group["batch_elements"])
        if group["algorithm"] == "muon" and group["neuron_beta"] is not None:
            plan = replace(plan, neurons=[_neurons(member) for member in members])
        plans.append(plan)
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


def _plan_muon(groups: tuple[int, ...], members: Sequence[_Planned], batch_elements: int | None) -> Plan:
    everywhere = tuple(
        i for i, member in enumerate(members) if is_dtensor(member.param) and not is_sharded_by_rows(member.param)
    )

    def owned(units: Sequence[Unit], rank: int) -> tuple[Range, ...]:
        return tuple((unit.start, unit.start + unit.numel) for unit in units if unit.owner == rank)

    def buckets(*, shared: bool) -> tuple[Bucket, ...]:
        travelling = (
            (i, member.param, member.sharding, member.units)
            for i, member in enumerate(members)
            if member.sharding is not None and member.shared == shared
        )
        return tuple(make_buckets(travelling, batch_elements))

    shapes = [member.param.shape if member.sharding is None else member.sharding.shape for member in members]
    return Plan(
        algorithm="muon",
        groups=groups,
        members=tuple(member.place for member in members),
        here=tuple(i for i, member in enumerate(members) if member.sharding is None and i not in everywhere),
        layouts=[member.layout for member in members],
        fans=[member.layout.fans(shape)[0] for member, shape in zip(members, shapes, strict=True)],
        everywhere=everywhere,
        buckets=buckets(shared=False),
        zero1_buckets=buckets(shared=True),
        shares={
            i: StateShares(s, tuple(owned(member.units, rank) for rank in range(len(s.ranges))))
            for i, member in enumerate(members)
            if member.shared and (s := member.sharding) is not None
        },
        has_dtensors=any(is_dtensor(member.param) for member in members),
    )


def _neurons(member: _Planned) -> Neurons | NeuronPieces | NeuronsOfParts:
    """Return the neurons of a parameter of which this rank has a number."""
    if member.sharding is None:
        return Neurons(member.layout, member.param.shape)
    rank = member.sharding.group.rank()
    if member.shared:
        return NeuronsOfParts([Neurons(unit.layout, unit.shape) for unit in member.units if unit.owner == rank])
    pieces = (Piece(0, unit, *unit.shards[rank]) for unit in member.units)
    return NeuronPieces([piece for piece in pieces if piece.numel])


def _plan_adamw(groups: tuple[int, ...], members: Sequence[_Planned], batch_elements: int | None) -> Plan:
    """Plan groups of AdamW: the update is element-wise, so only shared-out state needs other ranks."""
    shares = {}
    for i, member in enumerate(members):
        if member.shared and (sharding := member.sharding) is not None:
            cut = chunks(member.param.numel(), len(sharding.ranges))
            shares[i] = StateShares(sharding, tuple((chunk,) for chunk in cut))
    return Plan(
        algorithm="adamw",
        groups=groups,
        members=tuple(member.place for member in members),
        here=tuple(i for i in range(len(members)) if i not in shares),
        zero1_packs=tuple(_packs([member.param for member in members], shares, batch_elements)),
        shares=shares,
        has_dtensors=any(is_dtensor(member.param) for member in members),
    )


def _packs(
    params: Sequence[Tensor], shares: Mapping[int, StateShares], batch_elements: int | None
) -> Iterator[tuple[int, ...]]:
    """Pack parameters of one dtype, up to ``batch_elements``; a larger one is a pack by itself."""
    kinds: defaultdict[Any, list[int]] = defaultdict(list)
    for index, shared in shares.items():
        kinds[shared.sharding.group, params[index].device.type, params[index].dtype].append(index)
    for members in kinds.values():
        most_elements = batch_bound(batch_elements, params[members[0]].device)
        yield from map(tuple, bounded(members, lambda index: params[index].numel(), most_elements))
