"""Predictions of several ranks, written to one file; run by ``test_prediction_writer.py``."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muon.callbacks import PredictionWriter
from lightning_muon.data import EpochDataModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Rows(LightningModule):
    """Its predictions are rows about the samples, which are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[dict[str, Any]]:
        self.net(batch[:, None])
        return [{"number": number, "name": f"sample {number:.0f}, of many"} for number in batch]

    def configure_optimizers(self) -> None:
        return None


class Numbers(EpochDataModule):
    """The numbers from 0."""

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__(batch_size)
        self.count = count

    def predict_dataloader(self) -> Any:
        return self.predict_loader(Range(self.count))


class Range(Dataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))


def predict(path: Path, count: int, batch_size: int, devices: int = 1, strategy: str = "auto") -> None:
    """Predict numbers into a file."""
    trainer = Trainer(devices=devices, strategy=strategy, callbacks=[PredictionWriter(path)], **QUIET)
    trainer.predict(Rows(), datamodule=Numbers(count, batch_size), return_predictions=False)


def run(folder: Path, world_size: int) -> None:
    """Predict with several numbers of samples, shared out and not."""
    import lightning_muon.strategies  # noqa: F401 - it registers fsdp2

    for strategy in ("ddp", "fsdp2"):
        for count in (7, world_size + 1, 1):
            predict(folder / f"{strategy}-{count}.jsonl", count, 2, world_size, strategy)
