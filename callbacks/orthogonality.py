"""How far what Muon applied is from orthogonal."""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.extreme_singular_values import extreme_singular_values, lanczos
from lightning_muon.callbacks.monitor import StepMonitor, warn
from lightning_muon.callbacks.muon_matrices import muon_groups, names_in_module
from lightning_muon.callbacks.shards import largest_over_ranks


class OrthogonalityMonitor(StepMonitor):
    r"""Log how far the applied polar factors are from orthogonal.

    ``orthogonality_error/…`` is :math:`\lVert O^\top O - I \rVert_F / \sqrt r` with the smaller side :math:`r`, the
    RMS deviation of the squared singular values from one, as ``max``, ``mean`` and ``min`` over the matrices. Zero is
    exact; the five steps of Newton–Schulz that Muon takes give about 0.4; near one, the update has lost its rank.
    ``singular_value_min/…`` and ``singular_value_max/…`` are the extreme singular values, found by a few steps of
    Lanczos' iteration: to about 5e-4 up to a rank of 32; beyond, the smallest may be a little too large, the largest
    too small.

    It reads what the optimizer hands out through ``register_orthogonalize_hook``, in the steps that it logs and in no
    others. An optimizer without that hook is told once, and nothing is logged.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log each matrix too, under its parameter's name; or only those that match one of these patterns.
            Of several matrices in one parameter it is the worst.

    Raises:
        MisconfigurationException: If ``every_n_steps`` is less than one.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import OrthogonalityMonitor
        >>> trainer = Trainer(callbacks=[OrthogonalityMonitor(every_n_steps=100)])
    """

    def __init__(self, every_n_steps: int | None = None, per_parameter: bool | Sequence[str] = False) -> None:
        super().__init__(every_n_steps, per_parameter)
        self._measured: list[Measured] = []
        self._expected: list[str] = []  # of all that may be orthogonalized, on whatever rank

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._measured.clear()
        self._expected.clear()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
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
        names = names_in_module(optimizer, self._names)
        measured: list[Measured] = []

        def measure(owners: list[str], factors: Tensor) -> None:
            grams = gram_matrices(factors)
            found = lanczos(grams)
            measured.append(Measured([names[owner] for owner in owners], orthogonality_error(grams), found))

        handle = optimizer.register_orthogonalize_hook(measure)
        try:
            yield
        finally:
            handle.remove()
        self._expected += names.values()
        self._measured += measured

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the values together: each matrix is orthogonalized on one rank, which may have had none."""
        names, self._expected = list(dict.fromkeys(self._expected)), []
        measured, self._measured = self._measured, []
        if not names:
            return
        # By matrix: the error, minus the smallest and the largest singular value; the largest of each counts.
        worst = torch.full((len(names), 3), -torch.inf, dtype=torch.float64)
        positions = {name: position for position, name in enumerate(names)}
        for owners, errors, tridiagonals in (of_batch.on_cpu() for of_batch in measured):
            for name, error, tridiagonal in zip(owners, errors, tridiagonals, strict=True):
                smallest, largest = extreme_singular_values(tridiagonal)
                found = torch.tensor([error, -smallest, largest], dtype=torch.float64)
                position = positions[name]
                worst[position] = torch.maximum(worst[position], found)  # NaN is largest
        worst = largest_over_ranks(trainer, worst)
        seen = [position for position, values in enumerate(worst) if values[0] != -torch.inf]
        names = [names[position] for position in seen]
        error, smallest, largest = worst[seen].T * torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64)
        quantities = {
            "orthogonality_error": dict(zip(names, error.tolist(), strict=True)),
            "singular_value_min": dict(zip(names, smallest.tolist(), strict=True)),
            "singular_value_max": dict(zip(names, largest.tolist(), strict=True)),
        }
        self.log_summary(trainer, quantities)


class Measured(NamedTuple):
    """What was measured of the factors of one batch, on their device.

    Args:
        owners: The parameter that each belongs to.
        errors: Shape (b,).
        tridiagonals: What :func:`lanczos` has found, shape (b, 2, k).
    """

    owners: list[str]
    errors: Tensor
    tridiagonals: Tensor

    def on_cpu(self) -> "Measured":
        """Wait for the device."""
        return Measured(self.owners, self.errors.cpu(), self.tridiagonals.cpu())


@torch.no_grad()
def gram_matrices(factors: Tensor) -> Tensor:
    """Return OᵀO or OOᵀ of each matrix of a batch (b, m, n), whichever is smaller: shape (b, r, r), float32."""
    # Under manual optimization the step runs inside autocast, which would round the product to half precision.
    with torch.autocast(factors.device.type, enabled=False):
        factors = factors.float() if factors.shape[-2] <= factors.shape[-1] else factors.float().mT
        return factors @ factors.mT


@torch.no_grad()
def orthogonality_error(grams: Tensor) -> Tensor:
    """Return ‖G − I‖_F / √r of each of the :func:`gram_matrices` (b, r, r): shape (b,), float32."""
    rank = grams.shape[-1]
    errors: Tensor = torch.linalg.matrix_norm(grams - torch.eye(rank, device=grams.device)) / rank**0.5
    return errors
