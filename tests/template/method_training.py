"""A training of a generated project by each method of ``orthogonalize``, resumed in the middle."""

import logging
import warnings
from functools import partial
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch import Callback
from my_muon_project.data import TextData
from my_muon_project.model import GPT
from my_muon_project.module import TextModule

from lightning_muon.optim import MuonAdamW


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(method: str, steps: int, ckpt_path: str | None = None) -> tuple[Trainer, list[float]]:
    seed_everything(0, verbose=False)
    optimizer = partial(MuonAdamW, lr=0.02, orthogonalizer=method)
    module = TextModule(GPT(dim=32, depth=2, heads=2, context=32), context=32, optimizer=optimizer)
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, TextData(context=32, batch_size=8), ckpt_path=ckpt_path, weights_only=False)
    return trainer, losses.losses


def train_and_resume(methods: tuple[str, ...], steps: int, half: int) -> dict[str, tuple[list[float], bool]]:
    """By method: the losses of a whole training, and whether one resumed after ``half`` ends with its weights."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {}
    for method in methods:
        whole, losses = fit(method, steps)
        fit(method, half)[0].save_checkpoint("half.ckpt")
        resumed, _ = fit(method, steps, ckpt_path="half.ckpt")
        pairs = zip(whole.lightning_module.parameters(), resumed.lightning_module.parameters(), strict=True)
        found[method] = losses, all(torch.equal(a, b) for a, b in pairs)
    return found
