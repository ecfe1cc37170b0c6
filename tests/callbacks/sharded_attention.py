"""Attention logits and QK-clip, spread over the ranks in several ways."""

from collections.abc import Callable
from typing import Any

import torch
from attending import Fused, NextToken, Plain
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_muon.callbacks import AttentionLogitMonitor, QKClip
from lightning_muon.report.tags import name_of
from lightning_muon.strategies import FSDP2Strategy

STEPS = 5


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses FSDP without a GPU, but only to the class itself."""

    mixed_precision_config = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class Net(nn.Module):
    """Both forms of weights; one attention comes in the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.plain, self.late = Fused(), Plain(depth=1), Fused()
        self.passes = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.passes += 1
        logits: Tensor = self.fused(tokens) + self.plain(tokens)
        if self.passes > 2:
            logits = logits + self.late(tokens)
        return logits


WAYS: dict[str, Callable[[], Strategy | str]] = {
    "one": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
    "fsdp2": FSDP2Strategy,
    "fsdp": lambda: FSDPOnCPU(auto_wrap_policy={nn.MultiheadAttention}),
}


class Read(Callback):
    """What is logged in each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append({name_of(tag): float(value) for tag, value in trainer.callback_metrics.items()})


def fit(way: str, callbacks: list[Callback]) -> LightningModule:
    strategy = WAYS[way]
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if strategy() == "auto" else torch.distributed.get_world_size(),
        strategy=strategy(),
        max_steps=STEPS,
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = NextToken(Net, lambda net: torch.optim.SGD(net.parameters(), 0.5), steps=STEPS)
    trainer.fit(module)
    return module


def find(*ways: str) -> dict[str, Any]:
    """Train in each way with a clip that acts in each step; returns what is logged, or the error."""
    found: dict[str, Any] = {}
    for way in ways:
        monitor = AttentionLogitMonitor(per_parameter=True, queries=None, max_logit=None)
        read = Read()
        fit(way, [monitor, read])
        found[way] = read.steps
        read = Read()
        try:
            fit(way, [QKClip(0.1), monitor, read])
        except MisconfigurationException as error:
            found[f"{way} clipped"] = str(error)
        else:
            found[f"{way} clipped"] = read.steps
    return found
