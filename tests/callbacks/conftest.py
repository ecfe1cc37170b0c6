"""What the tests of the callbacks share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon.optim import route_parameters
from lightning_muon.report.tags import name_of, tag_of

MakeOptimizer = Callable[[list[dict[str, Any]], int], Optimizer]


class Events:
    """What a trainer's TensorBoard file says, that of its first logger unless another is given."""

    def __init__(self, trainer: Trainer, logger: TensorBoardLogger | None = None) -> None:
        written: Any = logger or trainer.logger
        written.experiment.flush()
        self._events = EventAccumulator(written.log_dir, size_guidance={"scalars": 0})
        self._events.Reload()

    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        tags = self._events.Tags()["scalars"]
        return {name_of(tag): [(event.step, event.value) for event in self._events.Scalars(tag)] for tag in tags}

    def texts(self, tag: str) -> list[str]:
        written = self._events.Tags()["tensors"]
        name = next((f"{one}/text_summary" for one in (tag, tag_of(tag)) if f"{one}/text_summary" in written), None)
        if name is None:
            return []
        return [event.tensor_proto.string_val[0].decode() for event in self._events.Tensors(name)]

    def plugin_data(self, tag: str) -> bytes:
        content: bytes = self._events.SummaryMetadata(tag).plugin_data.content
        return content


@pytest.fixture
def events() -> type[Events]:
    return Events


@pytest.fixture
def tensorboard(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path / "logs", default_hp_metric=False)


class Adversaries(LightningModule):
    """Two networks with parameters of equal names and an optimizer each, which step by hand.

    Args:
        make_optimizer: From parameter groups and the part's place to its optimizer.
        turns: How often each optimizer steps in a batch.
    """

    automatic_optimization = False

    def __init__(self, make_optimizer: MakeOptimizer, turns: Callable[[int], tuple[int, int]] = lambda _: (1, 1)):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
        self.critic = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
        self.make_optimizer = make_optimizer
        self.turns = turns

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, part, turns in zip(
            self.optimizers(), (self.generator, self.critic), self.turns(batch_idx), strict=True
        ):
            for _ in range(turns):
                optimizer.zero_grad()
                self.manual_backward(part(batch[0]).square().mean())
                optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        parts = (self.generator, self.critic)
        return [self.make_optimizer(route_parameters(part), place) for place, part in enumerate(parts)]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(160, 8)), batch_size=16)


@pytest.fixture
def adversaries() -> type[Adversaries]:
    """The class of a module with two optimizers."""
    return Adversaries


class Scaled(MixedPrecision):
    """Mixed precision with a gradient scaler, on the CPU."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def scaled() -> type[Scaled]:
    return Scaled


@pytest.fixture
def overflowing(regression: Any) -> Any:
    """The class of a small module whose second loss is infinite, so that a gradient scaler skips that step."""

    class Overflowing(regression):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss * (float("inf") if batch_idx == 1 else 1.0)

    return Overflowing
