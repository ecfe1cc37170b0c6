"""How large the weights of Muon's matrices are, and whether bfloat16 could still resolve their updates."""

from collections.abc import Generator, Mapping
from itertools import starmap

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.monitor import StepMonitor, logged_step, warn
from lightning_muon.callbacks.muon_matrices import entry_norms, muon_matrices
from lightning_muon.callbacks.shards import Shard, find_shards, names_with_gradient, over_ranks, sizes

# bfloat16 has 8 bits of precision: between 2^e and 2^(e+1) its numbers are 2^(e-7) apart.
BF16_FRACTION_BITS = 7

# The fraction of lost updates at which one is warned.
LOST_AT_MOST = 0.5


class WeightRMSMonitor(StepMonitor):
    r"""Log the size of the weights that Muon updates, and how far bfloat16 resolves their updates.

    Muon's updates have a fixed size, so without weight decay the weights grow, and with them the spacing of bfloat16
    numbers, until an update is rounded away. Five quantities, each as ``max``, ``mean`` and ``min`` over the matrices:

    - ``weight_rms/…``: root mean square of the entries.
    - ``weight_absmax/…``: largest entry in magnitude.
    - ``bf16_headroom/…``: RMS of the update over the spacing of bfloat16 numbers at the weight's RMS,
      :math:`\mathrm{rms}(W' - W) / 2^{\lfloor \log_2 \mathrm{rms}(W) \rfloor - 7}`. Below one half, most updates would
      be lost if the weights were kept in bfloat16.
    - ``update_in_ulps/…``: the same entry by entry, :math:`\sum |W' - W| / \sum \mathrm{ulp}(W)`, where
      :math:`\mathrm{ulp}(w)` is the spacing of bfloat16 numbers at :math:`w`.
    - ``lost_updates/…``: fraction of the entries that would stay what they are if they were bfloat16 numbers, whose
      update is rounded to nearest; where they are such, those that stayed.

    Where bfloat16 weights lose more than half of an update, one warning names the matrix. The last three are measured
    on a sample of the matrices that have a gradient and are not zero.

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
        self._sampled: list[tuple[list[str], list[Shard], list[Tensor]]] = []
        self._warned_of_loss = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._sampled.clear()
        self._warned_of_loss = False

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
        if not names:
            return
        entrywise = zip(*starmap(bf16_loss, zip(before, updates, strict=True)), strict=True)
        measured = [entry_norms(before, 2), entry_norms(updates, 2), entry_norms(updates, 1)]
        measured += [torch.stack(list(sums)) for sums in entrywise]
        self._sampled.append((names, shards, measured))

    @override
    @torch.no_grad()
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        matrices = muon_matrices(trainer.optimizers, pl_module)
        shards = find_shards(trainer, list(matrices.values()))
        local = [shard.local for shard in shards]
        norms, largest = entry_norms(local, 2), entry_norms(local, float("inf"))
        found = over_ranks(trainer, shards, [norms, largest, sizes(shards)])
        present = [index for index, size in enumerate(found.sum[2].tolist()) if size > 0]
        all_names = list(matrices)
        names = [all_names[index] for index in present]
        rms = found.norm[0] / found.sum[2].sqrt()
        quantities = {
            "weight_rms": dict(zip(names, rms[present].tolist(), strict=True)),
            "weight_absmax": dict(zip(names, found.max[1, present].tolist(), strict=True)),
            **self._headroom(trainer),
        }
        self.log_summary(trainer, quantities, self.per_parameter)
        self._warn_of_loss(trainer, {n: v for n, v in quantities["lost_updates"].items() if is_bf16(matrices[n])})

    def _headroom(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        sampled, self._sampled = self._sampled, []
        quantities: dict[str, dict[str, float]] = {"bf16_headroom": {}, "update_in_ulps": {}, "lost_updates": {}}
        for names, shards, measured in sampled:
            found = over_ranks(trainer, shards, [*measured, sizes(shards)])
            _, _, updates, spacings, lost, size = found.sum
            old, update = found.norm[:2] / size.sqrt()
            values = update / bf16_spacing(old), updates / spacings, lost / size
            for quantity, of_matrices in zip(quantities.values(), values, strict=True):
                # A matrix of zeros has no spacing to compare with.
                quantity |= {n: v for n, v, rms in zip(names, of_matrices.tolist(), old, strict=True) if rms != 0}
        return quantities

    def _warn_of_loss(self, trainer: Trainer, lost: Mapping[str, float]) -> None:
        """Name the matrix that loses most of its updates, once."""
        if not lost or self._warned_of_loss:
            return
        name = max(lost, key=lost.__getitem__)
        if lost[name] > LOST_AT_MOST:
            self._warned_of_loss = True
            warn(
                trainer,
                f"WeightRMSMonitor, step {logged_step(trainer)}: bfloat16 has rounded away {lost[name]:.0%} of the"
                f" update of {name}. Keep the weights in float32 (precision bf16-mixed), raise the learning rate, or"
                " make the weights smaller by weight decay (AutoWeightDecay). This is said once.",
            )


def is_bf16(tensor: Tensor) -> bool:
    """Tell whether a tensor is kept in bfloat16."""
    return tensor.dtype == torch.bfloat16


def bf16_loss(weight: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Say what bfloat16 would do to an update.

    Returns:
        The sum of the spacings of bfloat16 numbers at the weights, and how many entries the update would not change.
    """
    if is_bf16(weight):
        stays = update == 0  # it has happened
    else:
        rounded = weight.bfloat16()
        stays = (rounded.float() + update.float()).bfloat16() == rounded
    return bf16_spacing(weight.float().abs()).sum(), stays.sum(dtype=torch.float32)


def bf16_spacing(values: Tensor) -> Tensor:
    """Return the distance between neighbouring bfloat16 numbers at the size of each value; zero's is taken as tiny."""
    # frexp: value = fraction · 2^exponent with ½ ≤ fraction < 1
    _, exponent = torch.frexp(values.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.ldexp(torch.ones_like(values), exponent - 1 - BF16_FRACTION_BITS)
