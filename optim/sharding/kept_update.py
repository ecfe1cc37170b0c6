"""Updates of parameters that all ranks hold, by the ranks that keep their state (ZeRO-1)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lightning_muon.optim.adamw_update import adamw_update
from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.muon_update import MuonParameter, OrthogonalizeHook, batches, directions
from lightning_muon.optim.sharding.exchange import scatter, wire_dtype
from lightning_muon.optim.sharding.kept_state import Kept
from lightning_muon.optim.sharding.ownership import Unit
from lightning_muon.optim.sharding.pipeline import overlap
from lightning_muon.optim.sharding.rounds import Round
from lightning_muon.optim.sharding.sharded_update import apply_by_scale


@dataclass(frozen=True)
class KeptMuonParameter:
    """A whole parameter of Muon, with what this rank keeps of its state.

    Args:
        name: For hooks.
        weight: The weights.
        gradient: Theirs; None if there is none.
        layout: Where its matrices are.
        momentum: Of the elements that this rank keeps, shape (elements,); None without gradient.
        mean_square: The same for NorMuon's average, if it is asked for.
    """

    name: str
    weight: Tensor
    gradient: Tensor | None
    layout: MatrixLayout
    momentum: Tensor | None = None
    mean_square: Tensor | None = None


def kept_muon_update(
    parameters: Mapping[int, KeptMuonParameter],
    rounds: Iterable[Round],
    options: Mapping[str, Any],
    hooks: Sequence[OrthogonalizeHook] = (),
) -> None:
    """Update parameters by one step of Muon, the direction of each matrix found by the rank that owns it.

    Args:
        parameters: Those in the rounds, by position in their parameter group.
        rounds: What of them is sent out together.
        options: Those of the group.
        hooks: They hear of the matrices that this rank owns.
    """
    overlap(_update([parameters[i] for i in round_.members], round_, options, hooks) for round_ in rounds)


def _update(
    batch: Sequence[KeptMuonParameter], round_: Round, options: Mapping[str, Any], hooks: Sequence[OrthogonalizeHook]
) -> Iterator[None]:
    owned = _owned(batch, round_)
    found: dict[int, Tensor] = {}
    for alike in batches((part for part in owned if part is not None), options["batch_elements"]):
        for part, direction in zip(alike, directions(alike, options, hooks), strict=True):
            found[id(part)] = direction.reshape(-1)
    weight = batch[0].weight
    made = [
        found[id(part)] if part is not None else weight.new_zeros(unit.numel)
        for part, (_, unit) in zip(owned, round_.owned, strict=True)
    ]
    scattered = scatter(round_, made, None, wire_dtype(weight, options), weight.device)
    yield

    elements, _ = scattered()
    moving = [(p, step.view(p.weight.shape)) for p, step in zip(batch, elements, strict=True) if p.gradient is not None]
    apply_by_scale([(p.weight, step, p.layout.fans(p.weight.shape)) for p, step in moving], options)


def _owned(batch: Sequence[KeptMuonParameter], round_: Round) -> list[MuonParameter | None]:
    """Return the units that this rank owns as parameters of their own; None where there is no gradient."""
    seen: defaultdict[int, int] = defaultdict(int)
    parts: list[MuonParameter | None] = []
    for member, unit in round_.owned:
        p, first = batch[member], seen[member]
        seen[member] += unit.numel

        def of_whole(tensor: Tensor, unit: Unit = unit) -> Tensor:
            return tensor.reshape(-1)[unit.start : unit.start + unit.numel].view(unit.shape)

        def of_state(tensor: Tensor, unit: Unit = unit, first: int = first) -> Tensor:
            return tensor[first : first + unit.numel].view(unit.shape)

        parts.append(
            None
            if p.gradient is None or p.momentum is None
            else MuonParameter(
                p.name,
                of_whole(p.weight),
                of_whole(p.gradient),
                momentum=of_state(p.momentum),
                mean_square=None if p.mean_square is None else of_state(p.mean_square),
                layout=unit.layout,
            )
        )
    return parts


@dataclass(frozen=True)
class KeptAdamWParameter:
    """A whole parameter of AdamW, with what this rank keeps of its state.

    Args:
        weight: The weights.
        gradient: Theirs; None if there is none.
        kept: Which elements each rank keeps: a chunk, the first rank the largest.
        state: Moving averages of the gradient and of its square, of the elements that this rank keeps, each of shape
            (elements,), and the number of steps; None without gradient.
    """

    weight: Tensor
    gradient: Tensor | None
    kept: Kept
    state: tuple[Tensor, Tensor, Tensor] | None


def kept_adamw_update(packs: Iterable[Sequence[KeptAdamWParameter]], options: Mapping[str, Any]) -> None:
    """Update parameters by one step of AdamW, each element by the rank that keeps its state.

    Args:
        packs: Parameters of one dtype and group of ranks, whose new weights travel together.
        options: Those of the parameter group.
    """
    overlap(_adamw(pack, options) for pack in packs)


def _adamw(pack: Sequence[KeptAdamWParameter], options: Mapping[str, Any]) -> Iterator[None]:
    parts = [p.kept.part(p.weight) for p in pack]
    moving = [
        (part, p.kept.part(p.gradient), *p.state)
        for p, part in zip(pack, parts, strict=True)
        if p.gradient is not None and p.state is not None and part.numel() > 0
    ]
    adamw_update(moving, options)
    group = pack[0].kept.sharding.group
    chunks = [p.kept.size(0) for p in pack]
    packed = torch.cat([pad(part, (0, chunk - part.numel())) for part, chunk in zip(parts, chunks, strict=True)])
    gathered = packed.new_empty(group.size() * packed.numel())
    work = dist.all_gather_into_tensor(gathered, packed, group=group, async_op=True)
    yield

    work.wait()
    of_ranks = gathered.view(group.size(), -1).split(chunks, dim=1)
    for p, elements in zip(pack, of_ranks, strict=True):
        if p.gradient is not None:
            p.weight.copy_(elements.reshape(-1)[: p.weight.numel()].view(p.weight.shape))
