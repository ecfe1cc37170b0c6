"""Trainings on streamed tokens that tell which samples they used, by the first tokens of these."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_muon.data import StreamedTextDataModule

CONTEXT = 9


class Counting(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.used: list[list[int]] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
        assert batch.dtype == torch.int64
        self.used.append(batch[:, 0].tolist())
        loss: Tensor = self(batch[:, :1].expand(-1, 32) * 1e-6).sum()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.evaluated.extend(batch[:, 0].tolist())


def run(chunks: str, steps: int, workers: int, save: str | None, ckpt_path: str | None) -> dict[str, Any]:
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    module = Counting()
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto",
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        logger=False,
        callbacks=[] if save is None else [ModelCheckpoint(save, "saved", every_n_train_steps=steps)],
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = StreamedTextDataModule(chunks, chunks, context=CONTEXT, batch_size=4, num_workers=workers)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {"used": module.used, "evaluated": module.evaluated}
