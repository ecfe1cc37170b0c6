"""Muon on DTensors that are not sharded by rows, such as the column shards of tensor parallelism."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.muon_update import MuonParameter, OrthogonalizeHook, average, orthogonalize_batch
from lightning_muon.optim.sharding.dtensor import local_tensor
from lightning_muon.optim.sharding.sharded_update import apply_by_scale
from lightning_muon.optim.update_scale import nuclear_norm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class RedistributedParameter:
    """A DTensor.

    Args:
        name: For hooks.
        weight: The weights.
        layout: Where its matrices are.
        update: What this rank holds, with gradient and momentum; None if there is no gradient.
    """

    name: str
    weight: "DTensor"
    layout: MatrixLayout
    update: MuonParameter | None


def redistributed_muon_update(
    parameters: Iterable[RedistributedParameter], options: Mapping[str, Any], hooks: Sequence[OrthogonalizeHook]
) -> None:
    """Update parameters in place by one step of Muon, each matrix orthogonalized by every rank.

    DTensor's own redistribution gathers each parameter on all ranks, whatever its placements are. That is as slow as it
    sounds: it sends a parameter to all ranks where an owner would be enough, and all do the same work.

    Args:
        parameters: All of a group that are of this kind, on every rank of their meshes, in the same order.
        options: Those of the group.
        hooks: They hear of a parameter on the first rank of its mesh.
    """
    for p in parameters:
        held = local_tensor(p.weight)
        if p.update is None:
            source = torch.zeros_like(held)
        else:
            gradient = p.update.gradient
            source = gradient if options["polar_first"] else average([p.update], [gradient], options)[0]
        matrices = p.layout.matrices(_gathered(p.weight, source))
        is_first = not any(p.weight.device_mesh.get_coordinate() or ())
        factors = orthogonalize_batch([p.name] * len(matrices), matrices, options, hooks if is_first else ())
        if p.update is None:
            continue
        direction = _held_part(p, factors)
        if options["polar_first"]:
            direction = average([p.update], [direction], options)[0]
        if options["update_scale"] == "nuclear_norm":
            direction = direction * _held_part(p, nuclear_norm(matrices, factors).expand_as(factors))
        apply_by_scale([(held, direction, p.layout.fans(p.weight.shape))], options)


def _gathered(like: "DTensor", held: Tensor) -> Tensor:
    """Return the whole tensor of which each rank holds what it holds of a DTensor. All ranks of its mesh call this."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - it takes seconds, and is there if we come here

    parts = DTensor.from_local(held, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return parts.full_tensor()


def _held_part(p: RedistributedParameter, matrices: Tensor) -> Tensor:
    """Return what this rank holds of a parameter's matrices (b, m, n). No communication."""
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    mesh = p.weight.device_mesh
    whole = p.layout.restore(matrices, p.weight.shape)
    copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)
    return local_tensor(copies.redistribute(placements=p.weight.placements))
