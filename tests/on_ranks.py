"""What trainings of a test on several ranks without a GPU share."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses FSDP without a GPU, but only to the class itself."""

    mixed_precision_config = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def fit(
    module: LightningModule,
    strategy: Callable[[], Strategy | str],
    steps: int,
    callbacks: list[Callback],
    **options: Any,
) -> None:
    """Train on all ranks, or on this one alone if the strategy is "auto", with nothing but the callbacks."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if strategy() == "auto" else torch.distributed.get_world_size(),
        strategy=strategy(),
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module)
