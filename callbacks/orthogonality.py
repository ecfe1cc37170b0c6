"""How far what Muon applied is from orthogonal."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muon.callbacks.monitor import StepMonitor, log_scalars
from lightning_muon.callbacks.muon_matrices import muon_groups, summarize


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
        self._handles: list[RemovableHandle] = []
        self._errors: list[tuple[list[str], Tensor]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if muon_groups(optimizer, pl_module) and not hasattr(optimizer, "register_orthogonalize_hook"):
                rank_zero_warn(
                    f"OrthogonalityMonitor: {type(optimizer).__name__} does not hand out what it orthogonalizes,"
                    " so there is no orthogonality_error to log."
                )

    @override
    def before_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if hasattr(optimizer, "register_orthogonalize_hook"):
            self._handles.append(optimizer.register_orthogonalize_hook(self._measure))

    @override
    def after_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stop_listening()
        measured, self._errors = self._errors, []
        if not measured:
            return
        largest: dict[str, float] = {}
        names = [name for batch, _ in measured for name in batch]
        values = torch.cat([errors for _, errors in measured]).tolist()  # the only wait for the device
        for name, value in zip(names, values, strict=True):
            largest[name] = max(value, largest.get(name, 0.0))
        log_scalars(trainer, dict(summarize("orthogonality_error", largest, self.per_parameter)))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_listening()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_listening()

    def _measure(self, names: list[str], factors: Tensor) -> None:
        self._errors.append((names, orthogonality_error(factors)))

    def _stop_listening(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def orthogonality_error(factors: Tensor) -> Tensor:
    """Return ‖OᵀO − I‖_F / √r of each matrix of a batch (b, m, n), over its smaller side r: shape (b,), float32."""
    factors = factors.float() if factors.shape[-2] <= factors.shape[-1] else factors.float().mT
    rank = factors.shape[-2]
    gram = factors @ factors.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    errors: Tensor = torch.linalg.matrix_norm(gram) / rank**0.5
    return errors
