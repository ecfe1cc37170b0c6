r"""The size of weights at which bfloat16 begins to lose their updates.

Between 2^e and 2^(e+1) bfloat16 numbers are 2^(e-7) apart. So at the RMS :math:`R` of the weights the spacing is at
most :math:`2^{-7} R`, and the typical update is a spacing or more while :math:`R \le 2^7 \operatorname{rms}(ηU)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_muon.callbacks.measures.bf16_headroom import BF16_FRACTION_BITS
from lightning_muon.callbacks.muon_matrices import HALF, entry_norms
from lightning_muon.callbacks.shards import find_shards, over_ranks, sizes

# Matrices of a group whose update is looked at: twice as many as other monitors copy, since the target rests on them.
SAMPLE = 8

# What a group has beside its current learning rate: set by every scheduler, and by those that cycle.
PLANNED_LRS = ("initial_lr", "max_lr")

# A schedule that does not rise although it is below this fraction of what the group says, has another plan: LambdaLR
# over lr=1, for instance, whose function returns the learning rate itself.
NEAR_THE_PLAN = 0.5


def planned_lr(group: Mapping[str, Any]) -> float:
    """Return the learning rate that a group's schedule starts from, or rises to; 0 without a schedule."""
    return max(float(group.get(key) or 0.0) for key in PLANNED_LRS)


@dataclass
class Bf16Target:
    """The target of a group.

    Args:
        update_rms: Moving average of rms(U); 0 before the first update.
        lr: The learning rate of full updates: at the end of a schedule they vanish, whatever one does.
        largest_lr: The largest that there was.
        last_lr: The one of the last measurement.
    """

    update_rms: float = 0.0
    lr: float = 0.0
    largest_lr: float = 0.0
    last_lr: float = 0.0

    def saw_lr(self, lr: float, planned: float) -> None:
        """Take in the learning rate at a measurement, and the one that the group's schedule starts from or rises to."""
        rising = lr > self.last_lr
        self.largest_lr, self.last_lr = max(self.largest_lr, lr), lr
        follows_the_plan = rising or self.largest_lr >= NEAR_THE_PLAN * planned
        self.lr = max(self.largest_lr, planned if follows_the_plan else 0.0)

    def saw(self, update_rms: float, smoothing: float) -> None:
        """Take an update into the average."""
        past = smoothing if self.update_rms else 0.0
        self.update_rms = past * self.update_rms + (1 - past) * update_rms

    @property
    def rms(self) -> float | None:
        """The RMS of the weights to aim at, if it is known."""
        return 2**BF16_FRACTION_BITS * self.lr * self.update_rms or None

    def __str__(self) -> str:
        return f"2^{BF16_FRACTION_BITS} · lr {self.lr:.3g} · update RMS {self.update_rms:.3g}"


class UpdateSample:
    """Matrices that are copied for a step, to see what it adds to them beside the decay.

    Args:
        trainer: Knows the ranks.
        matrices: Some that have a gradient, by group.
    """

    def __init__(self, trainer: Trainer, matrices: Mapping[str, Sequence[Tensor]]) -> None:
        self._trainer = trainer
        self._groups = [group for group, members in matrices.items() for _ in members]
        self._shards = find_shards(trainer, [matrix for members in matrices.values() for matrix in members])
        # In half precision the update would be rounded to what the decay alone takes.
        wide = [torch.float32 if shard.local.dtype in HALF else shard.local.dtype for shard in self._shards]
        self._held = [shard.local.to(dtype, copy=True) for shard, dtype in zip(self._shards, wide, strict=True)]
        self._lrs: dict[str, float | Tensor] = {}

    @torch.no_grad()
    def finish(self, taken: Mapping[str, tuple[float | Tensor, float]]) -> None:
        """Make the updates of the copies: ηU = (1 - ηλ)W - W'.

        Args:
            taken: Learning rate and decay of the step, by group.
        """
        self._lrs = {group: lr for group, (lr, _) in taken.items()}
        if self._held:
            kept: list[Any] = [1 - taken[group][0] * taken[group][1] for group in self._groups]
            torch._foreach_mul_(self._held, kept)
            torch._foreach_sub_(self._held, [shard.local for shard in self._shards])

    def rms(self) -> Iterator[tuple[str, float]]:
        """Yield each group whose learning rate is not 0, with the RMS of U. A collective of all."""
        if not self._lrs or not self._groups:
            return
        found = over_ranks(self._trainer, self._shards, [entry_norms(self._held), sizes(self._shards)])
        squares, entries = found.norm[0].square(), found.sum[1]
        for group, lr in self._lrs.items():
            here = [place for place, owner in enumerate(self._groups) if owner == group]
            if here and float(lr) > 0:
                yield group, float((squares[here].sum() / entries[here].sum()).sqrt()) / float(lr)
