"""How large the weights of Muon's matrices are, and whether bfloat16 could still resolve their updates."""

from collections.abc import Generator

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.muon_matrices import entry_norms, muon_matrices
from lightning_muon.callbacks.shards import Shard, find_shards, names_with_gradient, over_ranks, sizes

# bfloat16 has 8 bits of precision: between 2^e and 2^(e+1) its numbers are 2^(e-7) apart.
BF16_FRACTION_BITS = 7


class WeightRMSMonitor(StepMonitor):
    r"""Log the size of the weights that Muon updates, and how far bfloat16 resolves their updates.

    Muon's updates have a fixed size, so without weight decay the weights grow, and with them the spacing of bfloat16
    numbers, until an update is rounded away. Three quantities, each as ``max``, ``mean`` and ``min`` over the matrices:

    - ``weight_rms/…``: root mean square of the entries.
    - ``weight_absmax/…``: largest entry in magnitude.
    - ``bf16_headroom/…``: RMS of the update over the spacing of bfloat16 numbers at the weight's RMS,
      :math:`\mathrm{rms}(W' - W) / 2^{\lfloor \log_2 \mathrm{rms}(W) \rfloor - 7}`. Below one half, most updates would
      be lost if the weights were kept in bfloat16. Measured on a sample of the matrices that have a gradient and
      are not zero.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log each matrix too, under its name.
        sample: How many matrices of an optimizer are copied for a step, to see their update.

    Raises:
        MisconfigurationException: If ``every_n_steps`` or ``sample`` is less than one.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import WeightRMSMonitor
        >>> trainer = Trainer(callbacks=[WeightRMSMonitor(every_n_steps=100)])
    """

    def __init__(self, every_n_steps: int | None = None, per_parameter: bool = False, sample: int = 8) -> None:
        super().__init__(every_n_steps)
        if sample < 1:
            raise MisconfigurationException(f"WeightRMSMonitor: sample must be at least 1, got {sample}")
        self.per_parameter = per_parameter
        self.sample = sample
        self._sampled: list[tuple[list[str], list[Shard], Tensor, Tensor]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._sampled.clear()

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Keep the size of sampled matrices before the step, and of their updates."""
        trainer = pl_module.trainer
        matrices = muon_matrices([optimizer], pl_module)
        moving = names_with_gradient(trainer, matrices)
        names = moving[:: -(-len(moving) // self.sample) or 1]
        shards = find_shards(trainer, [matrices[name] for name in names])
        before = [shard.local.clone() for shard in shards]
        yield
        updates = [shard.local - old for shard, old in zip(shards, before, strict=True)]
        self._sampled.append((names, shards, entry_norms(before, 2), entry_norms(updates, 2)))

    @override
    @torch.no_grad()
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        matrices = muon_matrices(trainer.optimizers, pl_module)
        shards = find_shards(trainer, list(matrices.values()))
        local = [shard.local for shard in shards]
        norms, largest = entry_norms(local, 2), entry_norms(local, float("inf"))
        found = over_ranks(trainer, shards, [norms, largest, sizes(shards)])
        present = [index for index, size in enumerate(found.sum[2].tolist()) if size > 0]
        names = [name for index, name in enumerate(matrices) if index in present]
        rms = found.norm[0] / found.sum[2].sqrt()
        quantities = {
            "weight_rms": dict(zip(names, rms[present].tolist(), strict=True)),
            "weight_absmax": dict(zip(names, found.max[1, present].tolist(), strict=True)),
            "bf16_headroom": self._headroom(trainer),
        }
        self.log_summary(trainer, quantities, self.per_parameter)

    def _headroom(self, trainer: Trainer) -> dict[str, float]:
        sampled, self._sampled = self._sampled, []
        headroom: dict[str, float] = {}
        for names, shards, before, updates in sampled:
            found = over_ranks(trainer, shards, [before, updates, sizes(shards)])
            old, update, _ = found.norm / found.sum[2].sqrt()
            ratios = update / bf16_spacing(old)
            # A matrix of zeros has no spacing to compare with.
            headroom |= {
                name: ratio for name, ratio, size in zip(names, ratios.tolist(), old, strict=True) if size != 0
            }
        return headroom


def bf16_spacing(values: Tensor) -> Tensor:
    """Return the distance between neighbouring bfloat16 numbers at the size of each value; zero's is taken as tiny."""
    # frexp: value = fraction · 2^exponent with ½ ≤ fraction < 1
    _, exponent = torch.frexp(values.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.ldexp(torch.ones_like(values), exponent - 1 - BF16_FRACTION_BITS)
