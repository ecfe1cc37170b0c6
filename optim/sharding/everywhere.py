"""The transport to all ranks: for DTensors that are not sharded by rows, as under tensor parallelism."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from lightning_muon.optim.sharding.dtensor import local_tensor
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
        hooks: Called on the first rank of the mesh alone.
    """

    def __init__(self, weight: "DTensor", here: MuonParameter, options: MuonOptions, hooks: Hooks) -> None:
        is_first = not any(weight.device_mesh.get_coordinate() or ())
        super().__init__([here], options, hooks if is_first else ())
        self.weight = weight

    @override
    def polar(self, sources: Sequence[Tensor]) -> Stages[tuple[Steps, Tensor | None]]:
        yield from ()
        p = self.batch[0]
        matrices = p.layout.matrices(self._gathered(sources[0]))
        factors = [
            self.orthogonalize([p.name] * len(of_shape), of_shape, fans, p.fans)
            for of_shape, fans in zip(matrices, p.layout.fans(self.weight.shape), strict=True)
        ]
        norms = None
        if self.needs_norms:
            norms = self._shard([nuclear_norm(m, f).expand_as(f) for m, f in zip(matrices, factors, strict=True)])
        return [self._shard(factors)], norms

    @override
    def normalize_neurons(self, steps: Steps, mean_squares: Sequence[Tensor]) -> Steps:
        raise NotImplementedError("refused by MuonAdamW: neuron_beta needs rows that are whole on one rank")

    @override
    def scale(self, steps: Steps, norms: Tensor) -> Steps:
        return [steps[0] * norms]

    def _gathered(self, shard: Tensor) -> Tensor:
        """Return the whole tensor of which each rank has a shard. A collective of the mesh."""
        from torch.distributed.tensor import DTensor  # noqa: PLC0415 - it takes seconds, and is loaded with the weight

        like = self.weight
        parts = DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        return parts.full_tensor()

    def _shard(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return this rank's shard of the parameter whose matrices are given, (b, m, n) a shape. No communication."""
        from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

        mesh = self.weight.device_mesh
        whole = self.batch[0].layout.restore(matrices, self.weight.shape)
        copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)
        return local_tensor(copies.redistribute(placements=self.weight.placements))
