"""The transport to all ranks: for DTensors that are not sharded by rows, as under tensor parallelism."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_muon.optim.sharding.dtensor import local_tensor
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.optim.update.muon import Hooks, MuonParameter, Stages, Steps, Transport
from lightning_muon.optim.update.options import MuonOptions
from lightning_muon.optim.update.scale import nuclear_norm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Everywhere(Transport):
    """Gather a parameter on all ranks by DTensor's own redistribution, whatever its placements are.

    This is slow: the whole parameter travels to every rank where its owner would be enough, and all ranks do the same
    work. All ranks of the mesh take part, with the same parameters in the same order.

    Args:
        weight: The parameter.
        here: This rank's shard of it.
        moving: Which of its matrices move, see :func:`moving_matrices`.
        hooks: Called on the first rank of the mesh alone.
    """

    def __init__(
        self, weight: "DTensor", here: MuonParameter, moving: Tensor, options: MuonOptions, hooks: Hooks
    ) -> None:
        is_first = not any(weight.device_mesh.get_coordinate() or ())
        super().__init__([here], options, hooks if is_first else Hooks())
        self.weight = weight
        self.moving = moving

    @override
    def polar(self, sources: Sequence[Tensor], gradients: Sequence[Tensor]) -> Stages[tuple[Steps, Tensor | None]]:
        yield from ()
        p = self.batch[0]
        matrices = p.layout.matrices(self._gathered(sources[0]))
        moving = self.moving.split(p.layout.counts(self.weight.shape))
        shape = self.weight.shape
        factors = [
            self.orthogonalize(([p.name] * len(firsts), firsts), of_shape, moves, fans, p.fans)
            for of_shape, moves, fans, firsts in zip(
                matrices, moving, p.layout.fans(shape), p.layout.firsts(shape), strict=True
            )
        ]
        numbers = None
        if self.needs_norms:
            numbers = [nuclear_norm(m, f) for m, f in zip(matrices, factors, strict=True)]
        elif self.options["polar_first"]:
            numbers = [moves.view(-1, 1, 1).float() for moves in moving]
        if numbers is None:
            return [shard_of(self.weight, p.layout, factors)], None
        of_shapes = [n.expand_as(f) for n, f in zip(numbers, factors, strict=True)]
        return [shard_of(self.weight, p.layout, factors)], shard_of(self.weight, p.layout, of_shapes)

    @override
    def normalize_neurons(self, steps: Steps) -> Steps:
        raise NotImplementedError("refused by MuonAdamW: neuron_beta needs rows that are whole on one rank")

    @override
    def keep_norms(self, steps: Steps) -> Steps:
        raise NotImplementedError("refused by MuonAdamW: fixed_norm needs rows that are whole on one rank")

    @override
    def scale(self, steps: Steps, numbers: Tensor) -> Steps:
        return [steps[0] * numbers]

    @override
    def rest(self, steps: Steps, numbers: Tensor) -> Steps:
        return [steps[0] * (numbers != 0)]

    def _gathered(self, shard: Tensor) -> Tensor:
        """Return the whole tensor of which each rank has a shard. A collective of the mesh."""
        from torch.distributed.tensor import DTensor  # noqa: PLC0415 - it takes seconds, and is loaded with the weight

        like = self.weight
        parts = DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        return parts.full_tensor()


def shard_of(weight: "DTensor", layout: MatrixLayout, matrices: Sequence[Tensor]) -> Tensor:
    """Return this rank's shard of a parameter whose matrices are given, (b, m, n) a shape. No communication."""
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    mesh = weight.device_mesh
    copies = DTensor.from_local(layout.restore(matrices, weight.shape), mesh, [Replicate()] * mesh.ndim)
    return local_tensor(copies.redistribute(placements=weight.placements))


def moving_matrices(parameters: Sequence[tuple["DTensor", MuonParameter]]) -> list[Tensor]:
    """Return which matrices of each parameter have a gradient that is not all zero, shape (matrices,).

    One collective for each dimension of a mesh. All its ranks take part, with the same parameters.
    """
    found = []
    for weight, p in parameters:
        gradient = torch.zeros_like(p.weight) if p.gradient is None else p.gradient
        count, fans = p.layout.count(weight.shape), p.layout.fans(weight.shape)
        sums = gradient.new_zeros(count, dtype=torch.promote_types(gradient.dtype, torch.float32))
        if count == 1:
            sums += torch.linalg.vector_norm(gradient, ord=1)
        elif gradient.numel():
            numbers = torch.arange(count, device=gradient.device).split(p.layout.counts(weight.shape))
            orders = [(out, fan_in) if not p.layout.transposed else (fan_in, out) for out, fan_in in fans]
            spread = [n.view(-1, 1, 1).expand(-1, *order) for n, order in zip(numbers, orders, strict=True)]
            of_elements = shard_of(weight, p.layout, spread)
            sums.index_add_(0, of_elements.reshape(-1), gradient.reshape(-1).to(sums.dtype).abs())
        found.append((sums != 0).float())
    by_mesh: defaultdict[Any, list[int]] = defaultdict(list)
    for index, (weight, _) in enumerate(parameters):
        by_mesh[weight.device_mesh].append(index)
    for mesh, members in by_mesh.items():
        packed = torch.cat([found[index] for index in members])
        for dim in range(mesh.ndim):
            dist.all_reduce(packed, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        for index, of_parameter in zip(members, packed.split([len(found[i]) for i in members]), strict=True):
            found[index] = of_parameter
    return [numbers != 0 for numbers in found]
