"""What the monitors share: when they measure, and how they log it."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override


class StepMonitor(Callback):
    """Measure around every n-th optimizer step.

    Subclasses fill in :meth:`before_step`, with gradients there and weights old, and :meth:`after_step`, with weights
    new. Between steps they cost nothing. With gradient accumulation a step is several batches; each hook still runs
    once a step, and once for each optimizer.

    Args:
        every_n_steps: How often. Default: the trainer's ``log_every_n_steps``.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise MisconfigurationException(
                f"{type(self).__name__}: every_n_steps must be at least 1, got {every_n_steps}"
            )
        self.every_n_steps = every_n_steps
        self._stepping: list[Optimizer] = []

    def before_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at gradients and old weights, if there is something to see."""

    def after_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the new weights and log what was found."""
        raise NotImplementedError

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._is_due(trainer):
            self._stepping.append(optimizer)
            self.before_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        stepped, self._stepping = self._stepping, []
        for optimizer in stepped:
            self.after_step(trainer, pl_module, optimizer)

    def _is_due(self, trainer: Trainer) -> bool:
        every: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (logged_step(trainer) + 1) % every == 0


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning logs what the current batch gives."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_scalars(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Send scalars to every logger, and to where ``ModelCheckpoint`` and ``EarlyStopping`` find them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=logged_step(trainer))
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Write a text to TensorBoard, where that is the logger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(tag, text, logged_step(trainer))
