"""A project in miniature: a module, its data, a default config, and a way to run its command line."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon.cli import MuonCLI, main

DEFAULT_CONFIG = """
seed_everything: 1
trainer:
  max_steps: 4
  val_check_interval: 4
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
model:
  dim: 4
  hidden: ${model.dim}
  optimizer:
    class_path: SGD
    init_args: {lr: 0.125, momentum: 0.5, weight_decay: 0.25}
  lr_scheduler:
    class_path: CosineAnnealingLR
    init_args: {T_max: "${trainer.max_steps}"}
data:
  dim: ${model.dim}
"""

CHECKPOINTS = """
trainer:
  enable_checkpointing: true
  callbacks+:
    - class_path: ModelCheckpoint
      init_args: {save_last: true, save_top_k: 0, every_n_train_steps: 1}
"""


class TinyModule(LightningModule):
    def __init__(
        self,
        dim: int = 4,
        hidden: int = 4,
        activation: Literal["relu", "gelu"] = "relu",
        scale: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if scale < 0:
            raise ValueError(f"scale is {scale},\nbut must not be negative")
        self.save_hyperparameters()
        self.hidden_layer, self.head = nn.Linear(dim, hidden), nn.Linear(hidden, 1)
        self.scale = scale
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.scale * self.head(self.hidden_layer(inputs).relu())
        return outputs

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self(batch[0]) - 1).square().mean()
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", (self(batch[0]) - 1).square().mean())

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.forward(batch[0])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # The head has an option of its own, as groups of a real project may.
        groups = [
            {"params": list(self.hidden_layer.parameters()), "algorithm": "adamw"},
            {"params": list(self.head.parameters()), "algorithm": "adamw", "weight_decay": 0.0},
        ]
        optimizer = self.optimizer(groups)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step"
        monitor = getattr(scheduler, "monitor", None)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": monitor},
        }


class TinyData(LightningDataModule):
    def __init__(self, dim: int = 4, batch_size: int = 4) -> None:
        super().__init__()
        self.dim, self.batch_size = dim, batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(32, self.dim)), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


RunTiny = Callable[..., MuonCLI]


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the config files, one thread, and no command line or debug mode from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.delenv("LIGHTNING_MUON_DEBUG", raising=False)
    (tmp_path / "default.yaml").write_text(DEFAULT_CONFIG)
    (tmp_path / "checkpoints.yaml").write_text(CHECKPOINTS)


@pytest.fixture
def run() -> RunTiny:
    """Runs the command line of the miniature project in this process."""

    def run_tiny(*args: str) -> MuonCLI:
        return main(TinyModule, TinyData, default_config="default.yaml", args=args)

    return run_tiny


@pytest.fixture
def saved(run: RunTiny) -> str:
    """A checkpoint after 4 steps; everything as in the default config."""
    run("fit", "--config", "checkpoints.yaml", "--trainer.default_root_dir", "first")
    return str(next(Path("first").rglob("last.ckpt")))


@pytest.fixture
def _without_a_process_group_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The port in the environment is taken back as well: processes that later tests start would take it over."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what is there now is restored
        monkeypatch.delenv(name)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
