"""The figures in TensorBoard: which classes are taken for which, and the worst mistakes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L  # noqa: N812 - the name that everyone knows
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

MOST_NAMES = 30
"""Up to so many classes, a confusion matrix shows numbers and names."""


class Mistakes(NamedTuple):
    """Images that were taken for another class, the surest first.

    Args:
        images: Shape (count, channels, height, width).
        probabilities: Those of the predicted classes, shape (count,).
        predicted: The predicted classes, shape (count,).
        labels: The true classes, shape (count,).
    """

    images: Tensor
    probabilities: Tensor
    predicted: Tensor
    labels: Tensor


class WorstMistakes(Metric):
    """The images that were taken for another class with the highest probabilities, of all ranks.

    Args:
        count: The largest number of images.
    """

    full_state_update = False
    images: list[Tensor]
    probabilities: list[Tensor]
    predicted: list[Tensor]
    labels: list[Tensor]

    def __init__(self, count: int = 16) -> None:
        super().__init__()
        self.count = count
        for name in Mistakes._fields:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take note of the mistakes of a batch."""
        probabilities, predicted = logits.softmax(dim=-1).max(dim=-1)
        # Those that are right sort to the end, instead of being removed: the device need not wait.
        score = torch.where(predicted == labels, -1.0, probabilities)
        batch = Mistakes(images, score, predicted, labels)
        for name, kept in self._worst(batch, self._so_far())._asdict().items():
            setattr(self, name, [kept])

    def compute(self) -> Mistakes:
        """Return the worst mistakes of all ranks."""
        worst = self._worst(self._so_far())
        is_mistake = worst.probabilities >= 0
        return Mistakes(*(values[is_mistake] for values in worst))

    def _so_far(self) -> Mistakes | None:
        if not len(self.images):  # a list; a tensor where the ranks have been gathered
            return None
        return Mistakes(*(dim_zero_cat(getattr(self, name)) for name in Mistakes._fields))

    def _worst(self, *parts: Mistakes | None) -> Mistakes:
        whole = Mistakes(*(torch.cat(values) for values in zip(*filter(None, parts), strict=True)))
        order = whole.probabilities.argsort(descending=True)[: self.count]
        return Mistakes(*(values[order] for values in whole))


def tensorboard(trainer: L.Trainer) -> Any:
    """Return the writer of TensorBoard, on the rank that writes; ``None`` elsewhere and without TensorBoard."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def draw_confusion(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix.

    Args:
        confusion: Number of images by true class (rows) and predicted class (columns).
        class_names: The names of the classes.
    """
    side = min(16.0, 2.5 + 0.4 * len(class_names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(class_names) <= MOST_NAMES:
        positions = range(len(class_names))
        axes.set_xticks(positions, class_names, rotation=90)
        axes.set_yticks(positions, class_names)
        for row, column in confusion.nonzero().tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", color=color, fontsize=8)
    return figure


def draw_mistakes(
    mistakes: Mistakes, class_names: Sequence[str], visible: Callable[[Tensor], Tensor] | None = None
) -> Figure:
    """Draw images, each below what it was taken for, how surely, and what it is.

    Args:
        mistakes: The images.
        class_names: The names of the classes.
        visible: Undoes the normalization of the images.
    """
    columns = 4
    rows = max(1, -(-len(mistakes.images) // columns))
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows))
    cells = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.02, 0.02, 0.98, 1 - 0.4 / (2.1 * rows), hspace=0.3)
    images = visible(mistakes.images) if visible else mistakes.images.clamp(0, 1)
    for axes in cells.flat:
        axes.axis("off")
    # Flattened, because torchmetrics makes numbers of tensors with one element.
    numbers = zip(*(values.flatten().tolist() for values in mistakes[1:]), strict=True)
    for axes, image, (probability, predicted, label) in zip(cells.flat, images.float().cpu(), numbers, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{class_names[predicted]} ({probability:.0%})\nis {class_names[label]}", fontsize=8)
    if not len(images):
        figure.text(0.5, 0.5, "no mistakes", ha="center")
    return figure
