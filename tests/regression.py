"""A small LightningModule for trainings of a second."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon.optim import route_parameters


class Regression(LightningModule):
    """A small network on a fixed linear problem: 10 batches an epoch, always in the same order."""

    def __init__(self, make_optimizer: Callable[[list[dict[str, Any]]], Any], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        self.make_optimizer = make_optimizer
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = (self.net(inputs) - targets).square().mean()
        self.log("train/loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val/loss", (self.net(inputs) - targets).square().mean())

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(route_parameters(self))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(80, 8, generator=generator)
        targets = inputs @ torch.randn(8, 4, generator=generator)
        return DataLoader(TensorDataset(inputs, targets), batch_size=8)

    val_dataloader = train_dataloader
