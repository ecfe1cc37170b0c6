"""The data: noisy waves of four shapes, made here."""

import math
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon.data import EpochDataModule, EpochLoader


class Data(EpochDataModule):
    """Waves (1, 64) and the number of their shape; each is used once an epoch, on any number of devices.

    Args:
        waves: Number of waves for training; a quarter as many are for validation.
        batch_size: Waves per batch and device.
        num_workers: Processes that load waves, for each device.
        seed: Seed of the order of waves.
    """

    def __init__(self, waves: int = 8000, batch_size: int = 256, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.waves = waves

    def train_dataloader(self) -> EpochLoader:
        """Return the loader for training."""
        return self.train_loader(noisy_waves(self.waves, seed=1))  # EDIT: your dataset, with __len__ and __getitem__

    def val_dataloader(self) -> EpochLoader:
        """Return the loader for validation."""
        return self.eval_loader(noisy_waves(max(1, self.waves // 4), seed=2))  # EDIT: your dataset

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader for predictions."""
        return self.predict_loader(noisy_waves(100, seed=3))  # EDIT: your dataset


def noisy_waves(count: int, seed: int) -> TensorDataset:
    """Return sines, squares, triangles and saws of one to four turns (count, 1, 64), and which they are (count,)."""
    draw = torch.Generator().manual_seed(seed)
    turns, start = 1 + 3 * torch.rand(count, 1, generator=draw), torch.rand(count, 1, generator=draw)
    at = (turns * torch.linspace(0, 1, 64) + start) % 1
    shapes = [torch.sin(2 * math.pi * at), torch.where(at < 0.5, 1.0, -1.0), 4 * (at - 0.5).abs() - 1, 2 * at - 1]
    which = torch.randint(4, (count,), generator=draw)
    waves = torch.stack(shapes)[which, torch.arange(count)]
    return TensorDataset((waves + 0.5 * torch.randn(count, 64, generator=draw))[:, None], which)
