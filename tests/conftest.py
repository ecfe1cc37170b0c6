"""Fixtures for the tests of all rooms."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon.optim import route_parameters

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep small tensors on one thread: faster for them, and the same sums everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def baked_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project generated with the default answers; copy it before changing anything in it."""
    # A space in the path, because a user's may have one.
    folder = tmp_path_factory.mktemp("baked project")
    command = [sys.executable, "-m", "cookiecutter", str(REPOSITORY), "--no-input", "--default-config"]
    # cookiecutter writes answers and clones below the home folder: not below the user's.
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
    subprocess.run([*command, "--output-dir", str(folder)], env=environment, check=True, capture_output=True)
    return folder / "my-muon-project"


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


@pytest.fixture
def regression() -> type[Regression]:
    """The class of a small LightningModule; it takes a function from parameter groups to optimizers."""
    return Regression


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Trainer]:
    """Fit a module quietly on the CPU; keywords go to the trainer."""

    def run(
        module: LightningModule, *, ckpt_path: str | None = None, train_dataloaders: Any = None, **options: Any
    ) -> Trainer:
        quiet = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "max_epochs": 1,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
        }
        trainer = Trainer(**{**quiet, **options})
        trainer.fit(module, train_dataloaders, ckpt_path=ckpt_path)
        return trainer

    return run
