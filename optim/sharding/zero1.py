"""Optimizer state that the ranks of DDP share out (ZeRO-1): who has which part, and the updates of its owners."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_muon.optim.sharding.buckets import Bucket
from lightning_muon.optim.sharding.exchange import scatter, wire_dtype
from lightning_muon.optim.sharding.pieces import neurons_of
from lightning_muon.optim.sharding.sharding import Range, Sharding, Unit
from lightning_muon.optim.update.adamw import AdamWParameter, adamw_update
from lightning_muon.optim.update.here import Here, same_shape_batches
from lightning_muon.optim.update.muon import Applied, Hooks, MuonParameter, Stages, Steps
from lightning_muon.optim.update.options import MuonOptions
from lightning_muon.optim.update.state import state_dtype

State = dict[str, Any]


@dataclass(frozen=True)
class StateShares:
    """Describe of which elements of a parameter each rank of its group has the state, as flat ranges."""

    sharding: Sharding
    ranges: tuple[tuple[Range, ...], ...]

    def numel(self, rank: int | None = None) -> int:
        """Return the number of elements in the share of a rank, by default of this one."""
        return sum(stop - start for start, stop in self.ranges[self.sharding.group.rank() if rank is None else rank])

    def of(self, tensor: Tensor) -> Tensor:
        """Return this rank's share of a whole tensor, shape (elements,); a view where it is one range."""
        flat = tensor.reshape(-1)
        parts = [flat[start:stop] for start, stop in self.ranges[self.sharding.group.rank()]]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else flat[:0]

    def of_state(self, state: Mapping[str, Any]) -> State:
        """Return this rank's share of the whole state of a parameter; all ranks have the step counts."""
        return {key: value if value.ndim == 0 else self.of(value).clone() for key, value in state.items()}


def consolidate(
    parameters: Sequence[tuple[Tensor, StateShares]], states: Mapping[Tensor, State], to: int
) -> list[State] | None:
    """Bring the shares of state together on the rank ``to`` of their groups. A collective: all ranks must call this.

    Returns:
        On that rank the whole state of each parameter, on the CPU; ``None`` on the others.
    """
    whole = [{k: v for k, v in states.get(p, {}).items() if v.ndim == 0} for p, _ in parameters]
    for group in dict.fromkeys(shares.sharding.group for _, shares in parameters):
        members = [index for index, (_, shares) in enumerate(parameters) if shares.sharding.group is group]
        described = [
            (index, key, value.dtype)
            for index in members
            for key, value in states.get(parameters[index][0], {}).items()
            if value.ndim > 0 and value.numel() > 0
        ]
        by_rank: list[Any] = [None] * group.size()
        dist.all_gather_object(by_rank, described, group=group)
        for rank, descriptions in enumerate(by_rank):
            for index, key, dtype in descriptions:
                param, shares = parameters[index]
                part = states[param][key] if group.rank() == rank else None
                if rank != to and part is not None:
                    dist.send(part, group=group, group_dst=to)
                if group.rank() == to:
                    if part is None:
                        part = torch.empty(shares.numel(rank), dtype=dtype, device=param.device)
                        dist.recv(part, group=group, group_src=rank)
                    entry = whole[index].setdefault(key, torch.zeros(shares.sharding.shape, dtype=dtype))
                    _write(entry, part, shares.ranges[rank])
    has_all = all(shares.sharding.group.rank() == to for _, shares in parameters)
    return whole if has_all else None


def _write(whole: Tensor, part: Tensor, ranges: Sequence[Range]) -> None:
    pieces = part.split([stop - start for start, stop in ranges])
    for (start, stop), piece in zip(ranges, pieces, strict=True):
        whole.view(-1)[start:stop] = piece


class OwnedState(Here):
    """Compute the steps of replicated matrices on their owners, which alone have their state, and send the steps out.

    Args:
        bucket: What is sent out together.
        parameters: The whole parameters of the bucket, with this rank's share (elements,) of their state.
    """

    def __init__(self, bucket: Bucket, parameters: Sequence[MuonParameter], options: MuonOptions, hooks: Hooks) -> None:
        self.bucket = bucket
        self.parameters = parameters
        self.units = list(_owned_units(bucket, parameters))
        moving = [owned.parameter for owned in self.units if owned.parameter.gradient is not None]
        super().__init__(list(same_shape_batches(moving, options["batch_elements"])), options, hooks)

    @override
    def read_momenta(self) -> list[Tensor | None]:
        self.shares = {
            member: p.momentum.read()
            for member, p in enumerate(self.parameters)
            if p.momentum is not None and p.momentum.stored.numel()
        }
        found = {
            id(owned.parameter): self.shares[owned.member][owned.in_share].view(owned.parameter.weight.shape)
            for owned in self.units
            if owned.member in self.shares
        }
        return [found[id(p)] for p in self.batch]

    @override
    def save_momenta(self, momenta: Sequence[Tensor | None]) -> None:
        gradients: defaultdict[int, list[Tensor]] = defaultdict(list)
        for owned in self.units:
            if owned.parameter.gradient is not None:
                gradients[owned.member].append(owned.parameter.gradient.flatten())
        for member, share in self.shares.items():
            if (momentum := self.parameters[member].momentum) is not None and share is not momentum.stored:
                momentum.save(share, torch.cat(gradients[member]))
        self.shares.clear()

    @override
    def deliver(self, steps: Steps) -> Stages[list[Applied]]:
        found = {id(unit): step.reshape(-1) for unit, step in zip(self.batch, self.split(steps), strict=True)}
        weight = self.parameters[0].weight
        units = [owned.parameter for owned in self.units]
        made = [found[id(u)] if id(u) in found else weight.new_zeros(u.weight.numel()) for u in units]
        elements, _ = yield from scatter(self.bucket, made, None, wire_dtype(weight, self.options), weight.device)
        return [
            (p, step.view(p.weight.shape).to(state_dtype("momentum_buffer", p.weight, p.options["momentum_dtype"])))
            for p, step in zip(self.parameters, elements, strict=True)
            if p.gradient is not None
        ]


@dataclass(frozen=True)
class _OwnedUnit:
    """A unit that this rank owns, as a parameter of its own.

    Args:
        member: The position of its parameter in the bucket.
        parameter: The unit; its momentum is the share of the whole parameter.
        in_share: Where the unit is in that share.
    """

    member: int
    parameter: MuonParameter
    in_share: slice


def _owned_units(bucket: Bucket, parameters: Sequence[MuonParameter]) -> Iterator[_OwnedUnit]:
    """Yield the units that this rank owns."""
    elements: defaultdict[int, int] = defaultdict(int)
    neurons: defaultdict[int, int] = defaultdict(int)
    for member, unit in bucket.owned:
        p, first, first_neuron = parameters[member], elements[member], neurons[member]
        elements[member] += unit.numel
        neurons[member] += neurons_of(unit).count
        as_parameter = replace(
            p,
            layout=unit.layout,
            weight=_of_unit(p.weight, unit),
            gradient=None if p.gradient is None else _of_unit(p.gradient, unit),
            mean_squares=None if p.mean_squares is None else p.mean_squares[first_neuron : neurons[member]],
            start=unit.start,
        )
        yield _OwnedUnit(member, as_parameter, slice(first, elements[member]))


def _of_unit(tensor: Tensor, unit: Unit) -> Tensor:
    return tensor.reshape(-1)[unit.start : unit.start + unit.numel].view(unit.shape)


def adamw_shares_step(pack: Sequence[AdamWParameter], shares: Sequence[StateShares]) -> Iterator[None]:
    """Update parameters by one step of AdamW, each element by the rank that has its state; pause while weights travel.

    The parameters are whole, of one dtype and process group, with this rank's share of their state. ``shares`` are the
    chunks of the ranks in each parameter; the first rank has the largest.
    """
    parts = [share.of(p.weight) for p, share in zip(pack, shares, strict=True)]
    gradients = [None if p.gradient is None else share.of(p.gradient) for p, share in zip(pack, shares, strict=True)]
    mine = [
        AdamWParameter(p.options, part, gradient, p.state)
        for part, gradient, p in zip(parts, gradients, pack, strict=True)
        if part.numel() > 0
    ]
    adamw_update(mine)
    group = shares[0].sharding.group
    chunks = [share.numel(rank=0) for share in shares]
    packed = torch.cat([pad(part, (0, chunk - part.numel())) for part, chunk in zip(parts, chunks, strict=True)])
    gathered = packed.new_empty(group.size() * packed.numel())
    work = dist.all_gather_into_tensor(gathered, packed, group=group, async_op=True)
    yield

    work.wait()
    of_ranks = gathered.view(group.size(), -1).split(chunks, dim=1)
    for p, elements in zip(pack, of_ranks, strict=True):
        if p.gradient is not None:
            p.weight.copy_(elements.reshape(-1)[: p.weight.numel()].view(p.weight.shape))
