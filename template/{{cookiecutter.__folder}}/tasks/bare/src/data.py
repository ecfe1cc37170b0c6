"""The data: points on two spirals, made here."""

import math

import torch
from torch.utils.data import TensorDataset

from lightning_muon.data import EpochDataModule, EpochLoader


class Data(EpochDataModule):
    """Points (2,) and the number of their spiral; each is used once an epoch, on any number of devices.

    Args:
        points: Number of points for training; a fifth as many are for validation.
        batch_size: Points per batch and device.
        num_workers: Processes that load points, for each device.
        seed: Seed of the order of points.
    """

    def __init__(self, points: int = 2000, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.points = points

    def train_dataloader(self) -> EpochLoader:
        """Return the loader for training."""
        return self.train_loader(spirals(self.points, seed=1))  # EDIT: your dataset, with __len__ and __getitem__

    def val_dataloader(self) -> EpochLoader:
        """Return the loader for validation, and for the predictions."""
        return self.eval_loader(spirals(max(1, self.points // 5), seed=2))  # EDIT: your dataset

    predict_dataloader = val_dataloader


def spirals(points: int, seed: int) -> TensorDataset:
    """Return points on two spirals with a little noise, from the middle outwards one and a half turns."""
    draw = torch.Generator().manual_seed(seed)
    radius, kind = torch.rand(points, generator=draw).sqrt(), torch.randint(2, (points,), generator=draw)
    angle = 3 * math.pi * radius + math.pi * kind
    noise = 0.02 * torch.randn(points, 2, generator=draw)
    return TensorDataset(radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) + noise, kind)
