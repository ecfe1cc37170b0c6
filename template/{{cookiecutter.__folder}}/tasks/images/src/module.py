"""The LightningModule: loss and metrics of an image classifier, and the classes of images."""

from typing import Any

import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_muon.callbacks import writes_predictions
from . import resnet, vit  # noqa: F401 - for the names of their networks: `--model.net ResNet`
from .figures import WorstMistakes, draw_confusion, draw_mistakes, tensorboard
from .training import TrainingModule


class ImageModule(TrainingModule):
    """Train a network to tell the class of an image.

    Args:
        net: Maps images (batch, channels, height, width) to logits (batch, classes). Its output may also be an object
            with these as ``logits``, as the models of ``transformers`` have it.
        classes: Number of classes.
        smoothing: Share of the target that is spread over all classes (arXiv:1512.00567). Then no loss is zero.
        top_k: An image counts in ``top…_accuracy`` if its class is among this many likeliest.
        training: The optimizer, its schedule and the routing.
    """

    def __init__(
        self, net: nn.Module, classes: int = 10, smoothing: float = 0.1, top_k: int = 3, **training: Any
    ) -> None:
        super().__init__(net, **training)
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and under 1, got {smoothing}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.save_hyperparameters()
        self.classes = classes
        self.smoothing = smoothing
        names = {"accuracy": 1, **({f"top{top_k}_accuracy": top_k} if 1 < top_k < classes else {})}
        accuracies = MetricCollection(
            {name: MulticlassAccuracy(classes, top_k=k, average="micro") for name, k in names.items()},
            compute_groups=False,
        )
        self.val_loss, self.val_accuracy = MeanMetric(), accuracies.clone("val/")
        self.test_loss, self.test_accuracy = MeanMetric(), accuracies.clone("test/")
        self.confusion, self.mistakes = MulticlassConfusionMatrix(classes), WorstMistakes()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of images and labels, in nats."""
        images, labels = batch
        loss = self._loss(self._logits(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of the validation images."""
        logits = self._evaluate(batch, "val", self.val_loss, self.val_accuracy)
        images, labels = batch
        self.confusion.update(logits, labels)
        self.mistakes.update(images, logits, labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of the test images."""
        self._evaluate(batch, "test", self.test_loss, self.test_accuracy)

    def on_validation_epoch_end(self) -> None:
        """Draw which classes are taken for which, and the images that the network is most wrongly sure of."""
        confusion, mistakes = self.confusion.compute(), self.mistakes.compute()  # all ranks together
        self.confusion.reset()
        self.mistakes.reset()
        writer = tensorboard(self.trainer)
        if writer is None or self.trainer.sanity_checking:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        names = getattr(data, "class_names", None) or [str(label) for label in range(self.classes)]
        writer.add_figure("confusion", draw_confusion(confusion.cpu(), names), self.global_step)
        figure = draw_mistakes(mistakes, names, data.form.visible if hasattr(data, "form") else None)
        writer.add_figure("worst_mistakes", figure, self.global_step)

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> list[dict[str, Any]]:
        """Return the class of each image with its probability; print them where they are not written to a file."""
        images, files = batch
        probabilities, labels = self._logits(images).softmax(dim=-1).max(dim=-1)
        names = self.trainer.datamodule.class_names  # type: ignore[attr-defined]
        found = [
            {"file": file, "class": names[label], "probability": round(probability, 4)}
            for file, label, probability in zip(files, labels.tolist(), probabilities.tolist(), strict=True)
        ]
        if not writes_predictions(self.trainer):
            self.print("\n".join(f"{one['file']}  {one['class']}  {one['probability']:.2f}" for one in found))
        return found

    def _logits(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) in float32.

        Raises:
            ValueError: If the network has another number of outputs.
        """
        output = self.net(images)
        logits: Tensor = getattr(output, "logits", output)
        if logits.shape != (len(images), self.classes):
            raise ValueError(
                f"the network gives outputs of shape {tuple(logits.shape)} for {len(images)} images of {self.classes}"
                " classes: set its number of classes, in a config by ${from_data:classes}"
            )
        return logits.float()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], stage: str, mean_loss: MeanMetric, accuracy: MetricCollection
    ) -> Tensor:
        images, labels = batch
        logits = self._logits(images)
        mean_loss.update(self._loss(logits, labels), weight=len(labels))
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", mean_loss, prog_bar=True)
        self.log_dict(accuracy, prog_bar=True)
        return logits
