"""A Lightning project of somebody else that takes `StopOnSignal`, and is signalled in its fourth step."""

import multiprocessing
import os
import signal
import sys
from typing import Any

from lightning.pytorch import Trainer
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


if __name__ == "__main__":
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    if "user" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: print("the user's own handler", flush=True))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=8,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing="unsaved" not in sys.argv,
        callbacks=[StopOnSignal()],
    )
    trainer.fit(Signalled())
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    print("trained to the end")
