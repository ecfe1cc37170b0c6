"""The LightningModule: loss, metrics and optimizer."""

import math

import lightning as L  # noqa: N812 - the name that everyone knows
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics.aggregation import MeanMetric
from torchmetrics.text import Perplexity

from lightning_muon.optim import MuonAdamW, Rule, route_parameters
from {{ cookiecutter.package_name }}.model import generate


class TextModule(L.LightningModule):
    """Train a network to predict the next byte.

    Args:
        net: Maps bytes (batch, time), int64, to logits (batch, time, 256). Its output may also be an object with these
            as ``logits``, as the models of ``transformers`` have it.
        context: Largest number of input bytes.
        optimizer: ``MuonAdamW`` or any optimizer of torch, such as ``--model.optimizer AdamW`` for comparison.
        lr_scheduler: Any scheduler of torch. ``ReduceLROnPlateau`` also takes the metric to ``monitor``.
        rules: Exceptions to the routing of parameters to Muon and AdamW.
        per_head: Let Muon orthogonalize each attention head by itself.
        strict_routing: Refuse to train while the role of a parameter is a guess, until a rule decides.
        compile: Compile the network with ``torch.compile``.
        sample_bytes: Number of bytes that ``predict`` generates.
        temperature: Divisor of the logits in ``predict``, over 0. Smaller values give more likely text.
    """

    def __init__(
        self,
        net: nn.Module,
        context: int = 256,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        rules: list[Rule] | None = None,
        per_head: bool = False,
        strict_routing: bool = False,
        compile: bool = False,
        sample_bytes: int = 400,
        temperature: float = 0.8,
    ) -> None:
        super().__init__()
        if sample_bytes < 0:
            raise ValueError(f"sample_bytes must be at least 0, got {sample_bytes}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be over 0 and finite, got {temperature}")
        self.save_hyperparameters()
        self.net = net
        self.context = context
        if compile:
            self.net.compile()  # in place, so that the names in checkpoints do not change
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.rules = rules or []
        self.per_head = per_head
        self.strict_routing = strict_routing
        self.sample_bytes = sample_bytes
        self.temperature = temperature
        self.val_loss, self.val_perplexity = MeanMetric(), Perplexity()
        self.test_loss, self.test_perplexity = MeanMetric(), Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next bytes, (batch, time, 256), for bytes (batch, time), int64."""
        output = self.net(tokens)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch (batch, context + 1), in nats per byte."""
        _, _, loss = self._next_bytes(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log loss and perplexity of the validation text."""
        self._evaluate(batch, "val", self.val_loss, self.val_perplexity)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log loss and perplexity of the test text."""
        self._evaluate(batch, "test", self.test_loss, self.test_perplexity)

    def on_validation_epoch_end(self) -> None:
        """Log the loss of a model that uses byte frequencies alone, as a baseline."""
        unigram_loss = getattr(self.trainer.datamodule, "unigram_loss", None)  # type: ignore[attr-defined]
        if unigram_loss is not None:
            self.log("val/unigram_loss", unigram_loss, sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[str]:
        """Continue each text of a batch (batch, bytes), print and return the results."""
        written = generate(self.forward, batch.long(), self.sample_bytes, self.context, self.temperature)
        texts = [bytes(row).decode(errors="replace") for row in written.tolist()]
        self.print("\n\n".join(texts))
        return texts

    def _next_bytes(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (batch, context, 256), targets (batch, context) and the loss."""
        tokens = batch.long()
        logits, targets = self(tokens[:, :-1]), tokens[:, 1:]
        return logits, targets, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _evaluate(self, batch: Tensor, stage: str, mean_loss: MeanMetric, perplexity: Perplexity) -> None:
        logits, targets, loss = self._next_bytes(batch)
        mean_loss.update(loss)
        perplexity.update(logits.float(), targets)
        self.log_dict({f"{stage}/loss": mean_loss, f"{stage}/perplexity": perplexity}, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Update hidden matrices by Muon and the other parameters by AdamW."""
        groups = route_parameters(self, self.rules, per_head=self.per_head, strict=self.strict_routing)
        optimizer = self.optimizer(groups)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        # ReduceLROnPlateau needs the validation loss, at the end of an epoch. Other schedulers step after each batch.
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step"
        monitor = getattr(scheduler, "monitor", None)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": monitor},
        }
