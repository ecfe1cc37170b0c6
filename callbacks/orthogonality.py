"""How far what Muon applied is from orthogonal."""

import math
from collections.abc import Generator

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.monitor import StepMonitor, warn
from lightning_muon.callbacks.muon_matrices import muon_groups, names_in_module
from lightning_muon.callbacks.shards import largest_over_ranks


class OrthogonalityMonitor(StepMonitor):
    r"""Log how far the applied polar factors are from orthogonal.

    ``orthogonality_error/…`` is :math:`\lVert O^\top O - I \rVert_F / \sqrt r` with the smaller side :math:`r`, the
    RMS deviation of the squared singular values from one, as ``max``, ``mean`` and ``min`` over the matrices. Zero is
    exact; the five steps of Newton–Schulz that Muon takes give about 0.4; near one, the update has lost its rank.

    It reads what the optimizer hands out through ``register_orthogonalize_hook``, in the steps that it logs and in no
    others. An optimizer without that hook is told once, and nothing is logged.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log each matrix too, under its parameter's name; the largest of several in one parameter.

    Raises:
        MisconfigurationException: If ``every_n_steps`` is less than one.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import OrthogonalityMonitor
        >>> trainer = Trainer(callbacks=[OrthogonalityMonitor(every_n_steps=100)])
    """

    def __init__(self, every_n_steps: int | None = None, per_parameter: bool = False) -> None:
        super().__init__(every_n_steps)
        self.per_parameter = per_parameter
        self._errors: list[tuple[list[str], Tensor]] = []
        self._names: list[str] = []  # of all that may be orthogonalized, on whatever rank

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._errors.clear()
        self._names.clear()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if muon_groups(optimizer) and not hasattr(optimizer, "register_orthogonalize_hook"):
                warn(
                    trainer,
                    f"OrthogonalityMonitor: {type(optimizer).__name__} does not hand out what it orthogonalizes,"
                    " so there is no orthogonality_error to log.",
                )

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        if not hasattr(optimizer, "register_orthogonalize_hook"):
            return
        names = names_in_module(optimizer, pl_module)
        errors: list[tuple[list[str], Tensor]] = []

        def measure(owners: list[str], factors: Tensor) -> None:
            errors.append(([names[owner] for owner in owners], orthogonality_error(factors)))

        handle = optimizer.register_orthogonalize_hook(measure)
        try:
            yield
        finally:
            handle.remove()
        self._names += names.values()
        self._errors += errors

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the errors together: each matrix is orthogonalized on one rank, which may have had none."""
        names, self._names = list(dict.fromkeys(self._names)), []
        measured, self._errors = self._errors, []
        if not names:
            return
        device = trainer.strategy.root_device
        owners = [name for of_batch, _ in measured for name in of_batch]
        values = torch.cat([torch.empty(0, device=device), *(errors.to(device) for _, errors in measured)])
        largest = torch.full((len(names),), -torch.inf, dtype=torch.float64)
        positions = {name: position for position, name in enumerate(names)}
        for name, value in zip(owners, values.cpu().double(), strict=True):  # the only wait for the device
            position = positions[name]
            largest[position] = torch.maximum(largest[position], value)  # NaN is largest
        found = dict(zip(names, largest_over_ranks(trainer, largest).tolist(), strict=True))
        errors_by_name = {name: value for name, value in found.items() if value != -math.inf}
        self.log_summary(trainer, {"orthogonality_error": errors_by_name}, self.per_parameter)


@torch.no_grad()
def orthogonality_error(factors: Tensor) -> Tensor:
    """Return ‖OᵀO − I‖_F / √r of each matrix of a batch (b, m, n), over its smaller side r: shape (b,), float32."""
    # Under manual optimization the step runs inside autocast, which would round the product to half precision.
    with torch.autocast(factors.device.type, enabled=False):
        factors = factors.float() if factors.shape[-2] <= factors.shape[-1] else factors.float().mT
        rank = factors.shape[-2]
        gram = factors @ factors.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        errors: Tensor = torch.linalg.matrix_norm(gram) / rank**0.5
    return errors
