"""A Lightning project of somebody else that takes `StopOnSignal`, and is signalled in its fourth step."""

import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from lightning_muon.callbacks import StopOnSignal


class Signalled(BoringModel):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 64), num_workers=1, multiprocessing_context="fork")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3 and sys.argv[1] != "nothing":
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGINT)  # as a terminal does
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        return super().training_step(batch, batch_idx)


class Averaged(BoringModel):
    """Is signalled in its second validation, in which it has the averages of its weights."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 4 and batch_idx == 1:
            torch.save(self.state_dict(), "averages.pt")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return super().validation_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.save(self.state_dict(), "trained.pt")


class Counting(BoringModel):
    """Counts the broadcasts between its steps."""

    broadcasts = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            broadcast = dist.broadcast

            def counted(*arguments: Any, **options: Any) -> Any:
                self.broadcasts += 1
                return broadcast(*arguments, **options)

            dist.broadcast = counted
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 7:
            self.counted = self.broadcasts


def broadcasts(*callbacks: str) -> int:
    """Train on two ranks, and return how many broadcasts there were in seven steps."""
    model = Counting()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=8,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[StopOnSignal() for _ in callbacks],
    )
    trainer.fit(model)
    return model.counted


if __name__ == "__main__":
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    if "user" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: print("the user's own handler", flush=True))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=8,
        limit_val_batches=3 if "averaged" in sys.argv else 0,
        val_check_interval=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing="unsaved" not in sys.argv,
        callbacks=[StopOnSignal(), *([EMAWeightAveraging(decay=0.5)] if "averaged" in sys.argv else [])],
    )
    trainer.fit(Averaged() if "averaged" in sys.argv else Signalled())
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    print("trained to the end")
