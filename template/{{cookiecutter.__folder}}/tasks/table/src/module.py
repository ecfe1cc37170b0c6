"""The LightningModule: loss, metrics and predictions of a table's target."""

from typing import Any

import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from lightning_muon.callbacks import writes_predictions
from lightning_muon.data import TableBatch, TableEncoding
from {{ cookiecutter.package_name }} import model  # noqa: F401 - for the names of its networks: `--model.net MLP`
from {{ cookiecutter.package_name }}.training import TrainingModule


class TableModule(TrainingModule):
    """Train a network to predict the target of a row: a class or a number.

    Args:
        net: Maps numbers (batch, numbers) and categories (batch, columns) to outputs (batch, outputs).
        outputs: The number of classes; 1: a number is to be predicted.
        training: The optimizer, its schedule and the routing.
    """

    def __init__(self, net: nn.Module, outputs: int, **training: Any) -> None:
        super().__init__(net, **training)
        if outputs < 1:
            raise ValueError(f"outputs must be at least 1, got {outputs}")
        self.save_hyperparameters()
        self.is_classifier = outputs > 1
        for split in ("val", "test"):
            metrics = classification_metrics(outputs) if self.is_classifier else regression_metrics()
            self.add_module(f"{split}_loss", MeanMetric())
            self.add_module(f"{split}_metrics", metrics.clone(prefix=f"{split}/"))

    def training_step(self, batch: TableBatch, batch_idx: int) -> Tensor:
        """Return the loss: cross entropy in nats, or the squared error in units of the target's variance."""
        loss = self._loss(self._outputs(batch), batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: TableBatch, batch_idx: int) -> None:
        """Log loss and metrics of the rows for validation."""
        self._evaluate(batch, "val")

    def test_step(self, batch: TableBatch, batch_idx: int) -> None:
        """Log loss and metrics of the rows for the test."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: TableBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return for each row its number in the file, the prediction and, of a class, its probability.

        They are printed where they are not written to a file.
        """
        outputs, rows = self._outputs(batch), batch.row.tolist()
        if self.is_classifier:
            probabilities, indices = outputs.softmax(dim=-1).max(dim=-1)
            found = [
                {"row": row, "prediction": self._encoding.classes[index], "probability": round(probability, 4)}
                for row, index, probability in zip(rows, indices.tolist(), probabilities.tolist(), strict=True)
            ]
        else:
            numbers = self._in_units(outputs).tolist()
            found = [{"row": row, "prediction": number} for row, number in zip(rows, numbers, strict=True)]
        if not writes_predictions(self.trainer):
            self.print("\n".join("  ".join(f"{value}" for value in one.values()) for one in found))
        return found

    @property
    def _encoding(self) -> TableEncoding:
        encoding: TableEncoding = self.trainer.datamodule.encoding  # type: ignore[attr-defined]
        return encoding

    def _outputs(self, batch: TableBatch) -> Tensor:
        """Return the outputs of the network in float32: (batch, classes), or (batch,) for numbers."""
        outputs: Tensor = self.net(batch.numbers, batch.categories).float()
        return outputs if self.is_classifier else outputs.squeeze(-1)

    def _loss(self, outputs: Tensor, batch: TableBatch) -> Tensor:
        if self.is_classifier:
            return F.cross_entropy(outputs, batch.target)
        return F.mse_loss(outputs, batch.target.float())

    def _in_units(self, standardized: Tensor) -> Tensor:
        return standardized * self._encoding.target_std + self._encoding.target_mean

    def _evaluate(self, batch: TableBatch, split: str) -> None:
        outputs = self._outputs(batch)
        mean_loss: Any = self.get_submodule(f"{split}_loss")
        metrics: Any = self.get_submodule(f"{split}_metrics")
        mean_loss.update(self._loss(outputs, batch), weight=len(outputs))
        if self.is_classifier:
            metrics.update(outputs, batch.target)
        else:
            metrics.update(self._in_units(outputs), self._in_units(batch.target.float()))
        self.log(f"{split}/loss", mean_loss, prog_bar=True)
        self.log_dict(metrics, prog_bar=True)


def classification_metrics(classes: int) -> MetricCollection:
    """Return the share of right answers, and the area under the ROC curve, mean of the classes."""
    return MetricCollection(
        {"accuracy": MulticlassAccuracy(classes, average="micro"), "auroc": MulticlassAUROC(classes, average="macro")}
    )


def regression_metrics() -> MetricCollection:
    """Return the errors in units of the target, and the share of its variance that is explained."""
    return MetricCollection({"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError(), "r2": R2Score()})
