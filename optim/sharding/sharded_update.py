"""The update of Muon's parameters of which a rank holds a piece, or a copy."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muon.optim.muon_update import (
    MuonParameter,
    OrthogonalizeHook,
    apply_directions,
    average,
    orthogonalize_batch,
)
from lightning_muon.optim.neuron_normalization import neuron_factors
from lightning_muon.optim.parameter_state import state_dtype
from lightning_muon.optim.sharding.exchange import gather, scatter, wire_dtype
from lightning_muon.optim.sharding.neurons import neuron_sums, neurons_per_matrix, spread_over
from lightning_muon.optim.sharding.ownership import Unit
from lightning_muon.optim.sharding.pipeline import overlap
from lightning_muon.optim.sharding.rounds import Round
from lightning_muon.optim.update_scale import nuclear_norm, scale_factor


@dataclass(frozen=True)
class ShardedParameter:
    """What a rank holds of a parameter.

    Args:
        name: For hooks.
        held: The weights that this rank holds; possibly none.
        update: The same with gradient and momentum, in the shape of ``held``; None if there is no gradient here.
    """

    name: str
    held: Tensor
    update: MuonParameter | None


def sharded_muon_update(
    parameters: Mapping[int, ShardedParameter],
    rounds: Iterable[Round],
    options: Mapping[str, Any],
    hooks: Sequence[OrthogonalizeHook] = (),
) -> None:
    """Update parameters in place by one step of Muon, each matrix orthogonalized by the rank that owns it.

    Every rank of a group must call this with the same rounds and options. Which collectives it issues, in which order,
    depends on them alone: whether it holds anything of a parameter, or has a gradient for it, makes no difference. What
    has no gradient here enters as zeros and is not touched.

    While one round is orthogonalized, the next is on its way to its owners and the one before on its way back.

    Args:
        parameters: What this rank holds of those in the rounds, by position in their parameter group.
        rounds: What of them travels together.
        options: Those of the group.
        hooks: They hear of the matrices that this rank owns.
    """
    overlap(_update([parameters[i] for i in round_.members], round_, options, hooks) for round_ in rounds)


def _update(
    batch: Sequence[ShardedParameter], round_: Round, options: Mapping[str, Any], hooks: Sequence[OrthogonalizeHook]
) -> Iterator[None]:
    """Take the parameters of a round through the stages of their update; pause where something is on its way."""
    sources = _sources(batch, options)
    dtype = wire_dtype(sources[0], options)
    gathered = gather(round_, sources, dtype)
    yield

    factors, norms = _orthogonalize(batch, round_, gathered(), options, hooks)
    scattered = scatter(round_, factors, norms, dtype, sources[0].device)
    yield

    elements, norms_by_unit = scattered()
    directions = _directions(batch, elements, options)
    if options["neuron_beta"] is not None:
        directions = _evened_out(batch, round_, directions, options["neuron_beta"])
    if options["update_scale"] == "nuclear_norm":
        directions = _scaled_by_norms(round_, directions, norms_by_unit)
    moving = zip(batch, round_.shardings, directions, strict=True)
    apply_by_scale([(p.held, d, p.update.layout.fans(s.shape)) for p, s, d in moving if p.update is not None], options)


def _sources(batch: Sequence[ShardedParameter], options: Mapping[str, Any]) -> list[Tensor]:
    """Return what is to be orthogonalized, the averages of the gradients or these; zeros without gradient."""
    if options["polar_first"]:
        return [torch.zeros_like(p.held) if p.update is None else p.update.gradient for p in batch]
    updates = [p.update for p in batch if p.update is not None]
    averages = iter(average(updates, [u.gradient for u in updates], options) if updates else ())
    return [torch.zeros_like(p.held) if p.update is None else next(averages) for p in batch]


def _orthogonalize(
    batch: Sequence[ShardedParameter],
    round_: Round,
    units: Sequence[Tensor],
    options: Mapping[str, Any],
    hooks: Sequence[OrthogonalizeHook],
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Orthogonalize the units that this rank owns, matrices of one shape as one batch; with their nuclear norms."""
    factors = [torch.zeros_like(unit) for unit in units]
    norms: list[Tensor] | None = None
    if options["update_scale"] == "nuclear_norm":
        norms = [
            elements.new_zeros(unit.layout.count(unit.shape))
            for elements, (_, unit) in zip(units, round_.owned, strict=True)
        ]
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for number, (member, unit) in enumerate(round_.owned):
        if unit.replicated and batch[member].update is None:
            continue  # nobody has a gradient
        alike[unit.layout.fans(unit.shape), unit.layout.transposed, units[number].dtype].append(number)
    for numbers in alike.values():
        owned = [round_.owned[number] for number in numbers]
        stacks = [unit.layout.matrices(units[n].view(unit.shape)) for n, (_, unit) in zip(numbers, owned, strict=True)]
        matrices = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
        of_each = [len(stack) for stack in stacks]
        names = [batch[member].name for (member, _), count in zip(owned, of_each, strict=True) for _ in range(count)]
        polar = orthogonalize_batch(names, matrices, options, hooks)
        for number, (_, unit), factor in zip(numbers, owned, polar.split(of_each), strict=True):
            factors[number] = unit.layout.restore(factor, unit.shape).reshape(-1)
        if norms is not None:
            for number, norm in zip(numbers, nuclear_norm(matrices, polar).flatten().split(of_each), strict=True):
                norms[number] = norm
    return factors, norms


def _directions(
    batch: Sequence[ShardedParameter], factors: Sequence[Tensor], options: Mapping[str, Any]
) -> list[Tensor]:
    """Return the direction of each parameter's step in its shape: the factor, or with ``polar_first`` its average."""
    factors = [factor.view(p.held.shape) for p, factor in zip(batch, factors, strict=True)]
    if not options["polar_first"]:
        return factors
    updates = [p.update for p in batch if p.update is not None]
    new = [factor for p, factor in zip(batch, factors, strict=True) if p.update is not None]
    averages = iter(average(updates, new, options) if updates else ())
    return [factor if p.update is None else next(averages) for p, factor in zip(batch, factors, strict=True)]


def _evened_out(
    batch: Sequence[ShardedParameter], round_: Round, directions: Sequence[Tensor], beta: float
) -> list[Tensor]:
    """Normalize neurons as on one device: what is summed over a neuron is summed over ranks too, all at once."""
    flat = [direction.reshape(-1) for direction in directions]
    squares: list[Tensor] = []
    for p, direction in zip(batch, directions, strict=True):
        square = direction.float().square()
        if p.update is not None and p.update.mean_square is not None:
            p.update.mean_square.lerp_(square.to(p.update.mean_square.dtype), 1 - beta)
            square = p.update.mean_square
        squares.append(square.reshape(-1))

    places = [(member, unit) for member, units in enumerate(round_.units) for unit in units]
    sums = []
    for member, unit in places:
        held = _held(round_, member, unit)
        start = unit.held[round_.rank][0] - unit.start
        both = (squares[member][held], flat[member][held].float().square())
        sums.append(torch.stack([neuron_sums(piece, unit, start) for piece in both]))
    _add_up_over_ranks([s for s, (_, unit) in zip(sums, places, strict=True) if _is_spread(unit)], round_)

    factors: list[list[Tensor]] = [[] for _ in batch]
    for (member, unit), (mean_squares, direction_squares) in zip(places, sums, strict=True):
        neurons = neurons_per_matrix(unit)
        per_neuron = unit.numel // mean_squares.numel()
        factor = neuron_factors(mean_squares.view(-1, neurons) / per_neuron, direction_squares.view(-1, neurons))
        start, stop = (bound - unit.start for bound in unit.held[round_.rank])
        factors[member].append(spread_over(factor.flatten(), unit, start, stop))
    return [
        direction * torch.cat(of_member).view(direction.shape)
        for direction, of_member in zip(directions, factors, strict=True)
    ]


def _add_up_over_ranks(sums: Sequence[Tensor], round_: Round) -> None:
    if not sums:
        return
    packed = torch.cat([s.flatten() for s in sums])
    dist.all_reduce(packed, group=round_.group)
    for s, total in zip(sums, packed.split([s.numel() for s in sums]), strict=True):
        s.copy_(total.view(s.shape))


def _scaled_by_norms(
    round_: Round, directions: Sequence[Tensor], norms: Mapping[tuple[int, int], Tensor]
) -> list[Tensor]:
    scaled = []
    for member, direction in enumerate(directions):
        pieces = [
            spread_over(
                norms[member, unit.start].repeat_interleave(neurons_per_matrix(unit)),
                unit,
                unit.held[round_.rank][0] - unit.start,
                unit.held[round_.rank][1] - unit.start,
            )
            for unit in round_.units[member]
            if unit.held[round_.rank][1] > unit.held[round_.rank][0]
        ]
        scaled.append(direction * torch.cat(pieces).view(direction.shape) if pieces else direction)
    return scaled


def apply_by_scale(steps: Iterable[tuple[Tensor, Tensor, tuple[int, int]]], options: Mapping[str, Any]) -> None:
    """Apply steps to weights of several shapes.

    Args:
        steps: The weights, the direction of their step, and the fan-out and fan-in of their matrices.
        options: Those of the parameter group.
    """
    alike: defaultdict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for weight, direction, fans in steps:
        # On one device, too, the direction has the dtype of the momentum.
        alike[scale_factor(options["update_scale"], *fans)].append(
            (weight, direction.to(state_dtype("momentum_buffer", weight)))
        )
    for scale, members in alike.items():
        apply_directions([weight for weight, _ in members], [step for _, step in members], options, scale)


def _held(round_: Round, member: int, unit: Unit) -> slice:
    """Return where in what this rank holds of a parameter its piece of a unit is."""
    first = round_.shardings[member].held[0]
    start, stop = unit.held[round_.rank]
    return slice(start - first, stop - first)


def _is_spread(unit: Unit) -> bool:
    return unit.holder is None and not unit.replicated
