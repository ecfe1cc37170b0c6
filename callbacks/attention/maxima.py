"""The largest logits of the heads of all modules that attend, over the passes of a step and over the ranks."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import pad

from lightning_muon.callbacks.shards import largest_over_ranks


class HeadMaxima:
    """The largest logit of each head of each module, by the module's name, since they were last read."""

    def __init__(self) -> None:
        self.heads: dict[str, int] = {}  # of each module, the same on all ranks
        self._largest: dict[str, Tensor] = {}

    def add(self, name: str, largest: Tensor) -> None:
        """Add the largest logits (heads,) of a call, which stay on their device."""
        if name in self._largest:
            seen = self._largest[name]
            heads = max(len(seen), len(largest))
            largest, seen = (pad(some, (0, heads - len(some)), value=-math.inf) for some in (largest, seen))
            largest = torch.maximum(seen, largest)
        self._largest[name] = largest

    def agree(self, trainer: Trainer) -> None:
        """Add the modules and heads that any rank has seen since the last reading to ``heads``. A collective."""
        own = {name: len(largest) for name, largest in self._largest.items()}
        of_ranks: list[Mapping[str, int]] = [own]
        if trainer.world_size > 1:
            of_ranks = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(of_ranks, own)
        for seen in of_ranks:
            for name, heads in seen.items():
                self.heads[name] = max(heads, self.heads.get(name, 0))

    def stacked(self, trainer: Trainer) -> Tensor:
        """Return the largest logits of all heads in ``heads``, one behind the other, on the device; forget them.

        Those of heads that this rank has not seen are -inf.
        """
        largest, self._largest = self._largest, {}
        device = trainer.strategy.root_device
        parts = []
        for name, heads in self.heads.items():
            part = largest.get(name, torch.empty(0, device=device))[:heads]
            parts.append(pad(part.to(device), (0, heads - len(part)), value=-math.inf))
        return torch.cat(parts) if parts else torch.empty(0, device=device)

    def read(self, trainer: Trainer) -> dict[str, list[float]]:
        """Return the largest logits over the ranks, by the name of the module; forget them. A collective.

        Modules that no rank has seen are left out.
        """
        if trainer.world_size == 1:
            self.agree(trainer)
        else:
            is_new = any(len(largest) > self.heads.get(name, 0) for name, largest in self._largest.items())
            if largest_over_ranks(trainer, torch.tensor([float(is_new)])).item():
                self.agree(trainer)
        values = largest_over_ranks(trainer, self.stacked(trainer)).tolist()
        found: dict[str, list[float]] = {}
        for name, heads in self.heads.items():
            found[name], values = values[:heads], values[heads:]
        return {name: of_heads for name, of_heads in found.items() if max(of_heads) != -math.inf}
