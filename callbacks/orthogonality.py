"""How far what Muon applied is from orthogonal."""

from collections.abc import Generator

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.monitor import StepMonitor, warn
from lightning_muon.callbacks.muon_matrices import muon_groups, names_in_module


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

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._errors.clear()

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
            errors.append(([names.get(owner, owner) for owner in owners], orthogonality_error(factors)))

        handle = optimizer.register_orthogonalize_hook(measure)
        try:
            yield
        finally:
            handle.remove()
        self._errors += errors

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured, self._errors = self._errors, []
        if not measured:
            return
        names = [name for owners, _ in measured for name in owners]
        device = measured[0][1].device
        values = torch.cat([errors.to(device) for _, errors in measured]).tolist()  # the only wait for the device
        found: dict[str, list[float]] = {}
        for name, value in zip(names, values, strict=True):
            found.setdefault(name, []).append(value)
        largest = {name: torch.tensor(of_blocks).max().item() for name, of_blocks in found.items()}  # NaN is largest
        self.log_summary(trainer, {"orthogonality_error": largest}, self.per_parameter)


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
