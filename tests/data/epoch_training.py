"""Trainings that tell which samples they used, by the numbers that the samples are."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_muon.data import EpochDataModule

SAMPLES = 37


class Counting(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.used: list[tuple[int, list[int]]] = []
        self.evaluated: list[list[int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.used.append((self.trainer.train_dataloader.batches.position.epoch, batch[0].tolist()))  # type: ignore[union-attr]
        loss: Tensor = (self.weight - batch[0].float()).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluated.append(batch[0].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Numbers(EpochDataModule):
    def train_dataloader(self) -> Any:
        return self.train_loader(TensorDataset(torch.arange(SAMPLES)))

    def val_dataloader(self) -> Any:
        return self.eval_loader(TensorDataset(torch.arange(SAMPLES)))


class SaveInEpoch(Callback):
    """Save after the last step but one, as a kill in the last one leaves it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps - 1:
            trainer.save_checkpoint(self.path)


def run(
    steps: int,
    batch_size: int,
    workers: int = 0,
    ckpt_path: str | None = None,
    save: str | None = None,
    is_ended: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """The samples of each batch that a checkpoint, in the run or after its end, knows of, with their epochs."""
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    module = Counting()
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[] if save is None or is_ended else [SaveInEpoch(save)],
        enable_checkpointing=False,
        limit_train_batches=limit,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=Numbers(batch_size, workers), ckpt_path=ckpt_path)
    if save is not None and is_ended:
        trainer.save_checkpoint(save)
    used = module.used if save is None or is_ended else module.used[:-1]
    return {"used": used, "evaluated": module.evaluated, "weight": float(module.weight)}
