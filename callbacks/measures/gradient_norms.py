"""Norms of the gradients of each step, kept on the device until they are read together."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.matrices import labelled_groups
from lightning_muon.callbacks.shards import entry_norms, find_shards
from lightning_muon.optim.sharding.dtensor import local_tensor


class StepNorms(NamedTuple):
    """What was measured before one step of an optimizer."""

    step: int
    place: int  # of the optimizer
    names: list[str]  # of the parameters whose gradient is not finite
    norm: float  # of the whole gradient


class GradientNorms:
    """The parameters of an optimizer, and the norms of their gradients on this rank that were not read yet.

    Args:
        trainer: The trainer, whose ranks share the parameters.
        place: The place of the optimizer in the trainer.
        optimizer: The optimizer.
        names: The names of the parameters by ``id``.
    """

    def __init__(self, trainer: Trainer, place: int, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        self.place = place
        named = [pair for group in labelled_groups([optimizer]) for pair in group.named_parameters(names)]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.seen: list[tuple[int, Tensor]] = []  # the step, and the norms (parameters,)
        self._nothing = [real_entries(local_tensor(p.detach())).new_empty(0) for p in self.parameters]
        # How many ranks have the same elements: their squares are added up over all ranks.
        self._replicas = torch.tensor(
            [
                trainer.world_size / math.prod(dist.get_world_size(group) for group in shard.groups)
                for shard in find_shards(trainer, self.parameters)
            ],
            dtype=torch.float64,
        )

    def is_complete(self, optimizer: Optimizer) -> bool:
        """Return whether these are all parameters of the optimizer."""
        return len(self.parameters) == sum(len(group["params"]) for group in optimizer.param_groups)

    def norms(self) -> Tensor:
        """Return the norms of this rank's parts of the gradients, shape (parameters,); 0 where there is none."""
        gradients = (p.grad for p in self.parameters)
        return entry_norms(
            nothing if g is None else real_entries(local_tensor(g))
            for g, nothing in zip(gradients, self._nothing, strict=True)
        )

    def read(self, trainer: Trainer) -> list[StepNorms]:
        """Return what was measured since the last call. A collective."""
        if not self.seen:
            return []
        steps, rows = zip(*self.seen, strict=True)
        self.seen = []
        norms = self.whole(trainer, torch.stack(rows))
        totals = norms.square().sum(1).sqrt().tolist()  # not finite if one of the norms is not
        seen = zip(steps, norms, totals, strict=True)
        return [StepNorms(step, self.place, self.bad(row), total) for step, row, total in seen]

    def whole(self, trainer: Trainer, norms: Tensor) -> Tensor:
        """Return norms (rows, parameters) of whole tensors from those of the ranks' parts; float64, CPU. A collective.

        One that is not finite on any rank is not finite here.
        """
        if trainer.world_size == 1:
            return norms.cpu().double()
        squares = norms.to(trainer.strategy.root_device, torch.float64).square()
        squares /= self._replicas.to(squares.device)
        dist.all_reduce(squares)
        return squares.cpu().sqrt()

    def bad(self, norms: Tensor) -> list[str]:
        """Return the names of the parameters whose norm is not finite, given all norms (parameters,)."""
        return [name for name, norm in zip(self.names, norms.tolist(), strict=True) if not math.isfinite(norm)]


def real_entries(tensor: Tensor) -> Tensor:
    """Return the entries of a tensor as real numbers."""
    if tensor.is_sparse:
        tensor = tensor._values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
