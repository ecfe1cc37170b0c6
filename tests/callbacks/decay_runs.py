"""For tests of the weight decay: two optimizers, their decay, and weights whose RMS follows a script."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_muon.optim import MuonAdamW

unstable = partial(MuonAdamW, lr=0.2, weight_decay=0.0)
healthy = partial(MuonAdamW, lr=1e-3, weight_decay=0.1)


def decay(trainer: Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["weight_decay"])


class Script(Callback):
    """Sets the weights' RMS to a given value before each measurement, the second matrix's to a multiple of it."""

    def __init__(self, values: list[float], second: float = 1.0) -> None:
        self.values = values
        self.factors = (1.0, second)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        value = self.values[min(trainer.global_step, len(self.values)) - 1]
        for group in trainer.optimizers[0].param_groups:
            if group["algorithm"] == "muon":
                for weight, factor in zip(group["params"], self.factors, strict=True):
                    weight.fill_(factor * value)
