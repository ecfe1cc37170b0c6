"""Trainings on several ranks in which one rank alone, or its shard, gets a NaN at a step."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from sharded_monitors import Uneven
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_muon.callbacks import NonFiniteError, RunGuard
from lightning_muon.optim import MuonAdamW
from lightning_muon.optim.sharding.dtensor import local_tensor
from lightning_muon.strategies import FSDP2Strategy
from tests.on_ranks import FSDPOnCPU

STEPS = 12


class Guarded(Uneven):
    """An epoch is one batch, so that a run resumes exactly."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        batch = super().train_dataloader().dataset[0]
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]


class SpoilOneRank(Callback):
    """Makes the last entry that a rank has of a gradient NaN, after the gradients have been reduced."""

    def __init__(self, rank: int, *steps: int) -> None:
        self.rank, self.steps = rank, steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step in self.steps and trainer.global_rank == self.rank:
            gradients = [local_tensor(p.grad) for p in pl_module.parameters() if p.grad is not None]
            next(g for g in gradients if g.numel()).view(-1)[-1] = math.nan


def strategy(name: str) -> Any:
    if name == "fsdp":
        return FSDPOnCPU(state_dict_type="sharded", accelerator=None)
    return {"ddp": DDPStrategy, "fsdp2": FSDP2Strategy}[name](process_group_backend="gloo")


def fit(name: str, world_size: int, callbacks: list[Callback], **options: Any) -> tuple[Trainer, LightningModule]:
    module = Guarded(lambda groups: MuonAdamW(groups, lr=0.01))
    ckpt_path = options.pop("ckpt_path", None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy(name),
        callbacks=callbacks,
        max_steps=STEPS,
        max_epochs=-1,
        log_every_n_steps=4,
        use_distributed_sampler=False,
        **{**quiet, **options},
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module


def whole(module: LightningModule) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module.state_dict().items()
    }


def stop_and_resume(name: str, world_size: int, folder: str, rank: int, step: int) -> dict[str, Any]:
    """The error of this rank, and whether the run that goes on from its checkpoint ends as one without a NaN does."""
    saving = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
    error: NonFiniteError | None = None
    try:
        fit(name, world_size, [SpoilOneRank(rank, step), RunGuard(), saving])
    except NonFiniteError as found:
        error = found
    assert error is not None
    _, resumed = fit(name, world_size, [RunGuard()], ckpt_path=error.checkpoint)
    _, straight = fit(name, world_size, [])
    again, expected = whole(resumed), whole(straight)
    return {
        "error": str(error),
        "checkpoints": sorted(path.name for path in Path(folder).iterdir()),
        "equal": all(torch.equal(again[key], expected[key]) for key in expected),
        "finite": all(bool(value.isfinite().all()) for value in again.values()),
    }


def skip(name: str, world_size: int, rank: int, step: int) -> dict[str, Any]:
    """Whether a run that skips a step ends as one whose gradients were dropped there."""

    class Drop(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if trainer.global_step == step:
                optimizer.zero_grad()

    guard = RunGuard(mode="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, guarded = fit(name, world_size, [SpoilOneRank(rank, step), guard])
    _, expected = fit(name, world_size, [Drop()])
    found, without = whole(guarded), whole(expected)
    return {"skipped": guard.skipped, "equal": all(torch.equal(found[key], without[key]) for key in without)}


def run(world_size: int, cases: list[tuple[str, str, int, int]]) -> list[dict[str, Any]]:
    """Each case: the strategy, a folder, and the rank and the step of the NaN."""
    return [
        {**stop_and_resume(name, world_size, folder, rank, step), **skip(name, world_size, rank, step)}
        for name, folder, rank, step in cases
    ]
