"""A run with Lightning's BackboneFinetuning goes on from a checkpoint after the backbone was unfrozen."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from lightning_muon.cli import MuonCLI, main
from lightning_muon.optim import route_parameters
from tests.cli.conftest import TinyData, TinyModule


class Finetuned(TinyModule):
    def __init__(
        self,
        dim: int = 4,
        hidden: int = 4,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(dim, hidden, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.backbone = self.hidden_layer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(route_parameters(self))
        assert self.lr_scheduler is not None
        return [optimizer], [self.lr_scheduler(optimizer)]


def test_it_goes_on_with_the_command_line() -> None:
    def run(*further: str) -> MuonCLI:
        options = ["log_every_n_steps=1", "default_root_dir=runs", "callbacks+=BackboneFinetuning"]
        arguments = ["fit", "--config", "checkpoints.yaml", *(f"--trainer.{option}" for option in options)]
        module = ["--model.optimizer=MuonAdamW", "--model.lr_scheduler=ExponentialLR", "--model.lr_scheduler.gamma=0.5"]
        unfreezing = "--trainer.callbacks.unfreeze_backbone_at_epoch=1"
        return main(
            Finetuned, TinyData, default_config="default.yaml", args=[*arguments, unfreezing, *module, *further]
        )

    run("--trainer.max_steps=12", "--model.optimizer.lr=0.1")
    checkpoint = next(Path("runs").rglob("last.ckpt"))
    cli = run("--trainer.max_steps=14", "--model.optimizer.lr=0.2", f"--ckpt_path={checkpoint}")
    groups = cli.trainer.optimizers[0].param_groups
    assert [group["name"] for group in groups] == ["head", "vector", "matrix", "vector_2"]
    # After one epoch. The backbone keeps the rate that the callback gave it: a tenth of what the head had then.
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.1, 0.005, 0.005])
    assert cli.model.backbone.weight.requires_grad
