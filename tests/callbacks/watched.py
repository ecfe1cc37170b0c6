"""What the monitors of a run logged, by the names of the quantities."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_muon.report.tags import name_of


def watched(trainer: Trainer) -> dict[str, Tensor]:
    """The last values, without the namespace of their tags."""
    return {name_of(tag): value for tag, value in trainer.callback_metrics.items()}


class Logged(Callback):
    """Keeps what is logged in each step, of the quantities whose names begin with one of the prefixes."""

    def __init__(self, *prefixes: str) -> None:
        self.prefixes = prefixes or ("",)
        self.steps: list[dict[str, float]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        values = watched(trainer).items()
        self.steps.append({name: float(value) for name, value in values if name.startswith(self.prefixes)})
