"""Trainings in which Lightning's BackboneFinetuning unfreezes a part of the model after two epochs."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muon.callbacks import (
    AutoWeightDecay,
    GradientMonitor,
    OptimizerTimeMonitor,
    OrthogonalityMonitor,
    RunGuard,
    UpdateRMSMonitor,
    WeightRMSMonitor,
)
from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.report.tags import name_of
from lightning_muon.strategies import FSDP2Strategy

Result = dict[str, Any]


class Pretrained(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.head(self.backbone(batch)).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        exact = {"orthogonalizer_options": {"dtype": "float32"}, "communication_dtype": "float32"}
        return MuonAdamW(route_parameters(self, lr_by_role={"matrix": 0.5}), lr=0.1, eps=1e-3, **exact)

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
        mine = rows.chunk(self.trainer.world_size, dim=1)[self.trainer.global_rank]
        return DataLoader(list(mine), batch_size=None)  # type: ignore[arg-type]


class SaveAfter(Callback):
    def __init__(self, epoch: int, path: str) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path, weights_only=False)


def fit(way: str, callbacks: list[Callback], ckpt_path: str | None = None) -> Result:
    """Weights, options and what was warned of."""
    several: dict[str, Any] = {"ddp": DDPStrategy, "fsdp2": FSDP2Strategy}
    module = Pretrained()
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if way in several else 1,
        strategy=several[way](process_group_backend="gloo") if way in several else "auto",
        max_epochs=6,
        callbacks=[BackboneFinetuning(2, lambda _: 1.5), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        gradient_clip_val=0.1,
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=ckpt_path)
    groups = trainer.optimizers[0].param_groups
    return {
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
        "groups": [(group["name"], group["algorithm"], group["param_names"], group["lr"]) for group in groups],
        # Those at the start: once the backbone moves there may be something to say.
        "warnings": [
            text for text in map(str, (one.message for one in heard)) if re.search("Monitor: |lr_by_role", text)
        ],
        "measured": sorted(map(name_of, trainer.callback_metrics)),
    }


def whole(value: Any) -> Tensor:
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()


def run(way: str, folder: str) -> list[Result]:
    """Straight with monitors, then from a checkpoint before the backbone is unfrozen, and from one after it."""
    monitors: list[Callback] = [
        WeightRMSMonitor(per_parameter=["backbone.0.*"], outputs=["backbone.2"]),
        OrthogonalityMonitor(),
        UpdateRMSMonitor(),
        GradientMonitor(),
        OptimizerTimeMonitor(),
        AutoWeightDecay(),
        RunGuard(),
    ]
    paths = [str(Path(folder, f"{way}-{epoch}.ckpt")) for epoch in (0, 3)]
    saving = [SaveAfter(epoch, path) for epoch, path in zip((0, 3), paths, strict=True)]
    return [fit(way, [*monitors, *saving]), *(fit(way, [], path) for path in paths)]
