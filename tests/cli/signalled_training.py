"""A training that is interrupted: each step depends on all before it, on its batch, and on all validations.

Beside its checkpoints it writes what it does, a line each, to ``journal.<rank>``.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from lightning_muon.cli import main
from lightning_muon.optim import MuonAdamW, route_parameters

# Lightning sets the second variable for the processes that it starts.
RANK = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def note(line: str) -> None:
    with Path(f"journal.{RANK}").open("a") as journal:
        journal.write(f"{line}\n")


class Net(LightningModule):
    def __init__(self, pause: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.pause = pause
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs)
        outputs: Tensor = self.head(inputs)
        return outputs

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        note("batch")
        time.sleep(self.pause)
        loss: Tensor = (self(batch) - batch.sum(-1, keepdim=True)).square().mean()
        self.log("train/loss", loss)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        note(f"train {self.trainer.global_step} {batch[0, 0].item():.6f} {loss.item():.6f} {rate:.6f}")
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(self.pause / 2)
        self.log("val/loss", (self(batch) - batch.sum(-1, keepdim=True)).square().mean(), sync_dist=True)
        note(f"val {self.trainer.global_step} {batch_idx}")

    def on_train_end(self) -> None:
        self.trainer.save_checkpoint("final.ckpt")

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(route_parameters(self), lr=0.02)
        # The rate falls with each validation after which the loss is not lower by much.
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7, threshold=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


class Batches:
    """Each batch is drawn from its number; a loader that resumes where it was."""

    def __init__(self, length: int, endless: bool) -> None:
        self.length, self.endless, self.drawn = length, endless, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        if not self.endless:
            self.drawn = 0
        for _ in range(self.length):
            self.drawn += 1
            yield torch.randn(4, 8, generator=torch.Generator().manual_seed(self.drawn * WORLD_SIZE + RANK))

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


class Data(LightningDataModule):
    def __init__(self, batches: int = 12, val_batches: int = 3) -> None:
        super().__init__()
        self.batches, self.val_batches = batches, val_batches

    def train_dataloader(self) -> Batches:
        return Batches(self.batches, endless=True)

    def val_dataloader(self) -> Batches:
        return Batches(self.val_batches, endless=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    note(f"pid {os.getpid()}")
    note("begin")
    main(Net, Data, default_config="training.yaml", args=sys.argv[1:])
    note("end")
