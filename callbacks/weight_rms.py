"""How large the weights of Muon's matrices are, and whether bfloat16 could still resolve their updates."""

from collections.abc import Generator

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.muon_matrices import entry_norms, muon_matrices, root_mean_square

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
        self._sampled: list[tuple[list[str], Tensor, Tensor]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._sampled.clear()

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Keep the RMS of sampled matrices before the step, and of their updates."""
        matrices = muon_matrices([optimizer], pl_module)
        moving = [name for name, matrix in matrices.items() if matrix.grad is not None]
        names = moving[:: -(-len(moving) // self.sample) or 1]
        before = [matrices[name].detach().clone() for name in names]
        yield
        updates = [matrices[name].detach() - old for name, old in zip(names, before, strict=True)]
        self._sampled.append((names, root_mean_square(before), root_mean_square(updates)))

    @override
    @torch.no_grad()
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        matrices = muon_matrices(trainer.optimizers, pl_module)
        rms = root_mean_square(matrices.values())
        largest = entry_norms(matrices.values(), float("inf"))
        sampled, self._sampled = self._sampled, []
        headroom: dict[str, float] = {}
        for names, before, updates in sampled:
            ratios = (updates / bf16_spacing(before)).tolist()
            # A matrix of zeros has no spacing to compare with.
            headroom |= {
                name: ratio for name, ratio, old in zip(names, ratios, before.tolist(), strict=True) if old != 0
            }
        quantities = {
            "weight_rms": dict(zip(matrices, rms.tolist(), strict=True)),
            "weight_absmax": dict(zip(matrices, largest.tolist(), strict=True)),
            "bf16_headroom": headroom,
        }
        self.log_summary(trainer, quantities, self.per_parameter)


def bf16_spacing(values: Tensor) -> Tensor:
    """Return the distance between neighbouring bfloat16 numbers at the size of each value; zero's is taken as tiny."""
    # frexp: value = fraction · 2^exponent with ½ ≤ fraction < 1
    _, exponent = torch.frexp(values.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.ldexp(torch.ones_like(values), exponent - 1 - BF16_FRACTION_BITS)
