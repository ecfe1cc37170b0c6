"""How large the weights of Muon's matrices are, and whether bfloat16 could still resolve their updates."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.monitor import StepMonitor, log_scalars
from lightning_muon.callbacks.muon_matrices import muon_matrices, root_mean_square, summarize

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
      be lost if the weights were kept in bfloat16. Measured on a sample of the matrices.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log each matrix too, under its name.
        sample: How many matrices are copied for a step, to see their update.

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
        self._before: dict[str, Tensor] = {}

    @override
    def before_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        matrices = muon_matrices(optimizer, pl_module)
        stride = -(-len(matrices) // self.sample) or 1
        self._before |= {name: matrices[name].detach().clone() for name in list(matrices)[::stride]}

    @override
    @torch.no_grad()
    def after_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        matrices = muon_matrices(optimizer, pl_module)
        if not matrices:
            return
        before = {name: self._before.pop(name) for name in list(self._before) if name in matrices}
        rms = root_mean_square(matrices)
        largest = torch.stack(torch._foreach_norm(list(matrices.values()), ord=float("inf"), dtype=torch.float32))
        update = root_mean_square({name: matrices[name] - old for name, old in before.items()})
        headroom = update / bf16_spacing(root_mean_square(before))

        measured = torch.cat([rms, largest, headroom]).tolist()  # the only wait for the device
        count = len(matrices)
        scalars: dict[str, float] = {}
        for quantity, names, values in (
            ("weight_rms", matrices, measured[:count]),
            ("weight_absmax", matrices, measured[count : 2 * count]),
            ("bf16_headroom", before, measured[2 * count :]),
        ):
            scalars |= summarize(quantity, dict(zip(names, values, strict=True)), self.per_parameter)
        log_scalars(trainer, scalars)


def bf16_spacing(values: Tensor) -> Tensor:
    """Return the distance between neighbouring bfloat16 numbers at the size of each value; zero's is taken as tiny."""
    # frexp: value = fraction · 2^exponent with ½ ≤ fraction < 1
    _, exponent = torch.frexp(values.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.ldexp(torch.ones_like(values), exponent - 1 - BF16_FRACTION_BITS)
