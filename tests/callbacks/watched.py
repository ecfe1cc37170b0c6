"""What the monitors of a run logged, by the names of the quantities."""

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_muon.report.tags import name_of


def watched(trainer: Trainer) -> dict[str, Tensor]:
    """The last values, without the namespace of their tags."""
    return {name_of(tag): value for tag, value in trainer.callback_metrics.items()}
