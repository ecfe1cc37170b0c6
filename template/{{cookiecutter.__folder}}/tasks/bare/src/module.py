"""The LightningModule: what is computed in a step of training and of validation."""

from typing import Any

import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn

from {{ cookiecutter.package_name }}.training import TrainingModule

Batch = tuple[Tensor, Tensor]


class Module(TrainingModule):
    """Train a network to classify waves.

    Args:
        net: Maps waves (batch, 1, time) to logits (batch, 4).
        training: The optimizer, its schedule and the routing.
    """

    def __init__(self, net: nn.Module, **training: Any) -> None:  # EDIT: arguments here are options: --model.…
        super().__init__(net, **training)
        self.save_hyperparameters()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = F.cross_entropy(self.net(inputs), targets)  # EDIT: your loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the metrics of a batch; Lightning takes their mean. ``val/loss`` chooses the best checkpoint."""
        inputs, targets = batch
        logits = self.net(inputs)
        loss, accuracy = F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean()
        self.log_dict({"val/loss": loss, "val/accuracy": accuracy}, prog_bar=True, sync_dist=True)  # EDIT: your metrics

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, int]]:
        """Return a row for each wave, which ``predict --output found.csv`` writes."""
        return [{"class": label} for label in self.net(batch[0]).argmax(-1).tolist()]  # EDIT: your predictions
