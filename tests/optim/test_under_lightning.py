"""The optimizer under Lightning's automatic optimization."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_muon.optim import MuonAdamW, route_parameters

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

muon = partial(MuonAdamW, lr=0.02)


def weights(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_it_learns(regression: Module, fit: Fit) -> None:
    module = regression(muon)
    fit(module, max_epochs=5)
    assert module.losses[-1] < 0.2 * module.losses[0]


def test_accumulation_is_a_larger_batch(regression: Module, fit: Fit) -> None:
    accumulated, large = regression(muon), regression(muon)
    fit(accumulated, accumulate_grad_batches=2)
    fit(large, train_dataloaders=DataLoader(large.train_dataloader().dataset, batch_size=16))
    torch.testing.assert_close(weights(accumulated), weights(large), atol=1e-5, rtol=0)


def test_clipping_by_norm_reaches_both_algorithms(regression: Module, fit: Fit) -> None:
    """Muon's update does not depend on the norm, AdamW's first does not either; the momentum shows the clipping."""
    module = regression(muon)
    trainer = fit(module, max_steps=1, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")
    optimizer = trainer.optimizers[0]
    state = optimizer.state
    squares = [
        (state[p]["momentum_buffer"] / 0.05 if "momentum_buffer" in state[p] else state[p]["exp_avg"] / 0.1)
        .square()
        .sum()
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert torch.stack(squares).sum().sqrt() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "64-true"])
def test_precisions(regression: Module, fit: Fit, precision: str) -> None:
    """On a CPU Lightning turns 16-mixed into bf16-mixed; the loss scaling of float16 has a test of its own."""
    module = regression(muon)
    fit(module, max_epochs=5, precision=precision)
    assert module.losses[-1] < 0.3 * module.losses[0]


def test_float16_loss_scaling_skips_a_step_that_overflowed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = muon(route_parameters(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weights(model).clone()
    for gradient in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(3, 4)).sum() * gradient).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        skipped = torch.equal(weights(model), before)
        assert skipped == (gradient == float("inf"))
    assert weights(model).isfinite().all()
    assert scaler.get_scale() == 2.0


SCHEDULERS = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda _step: 0.9),
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2, 4]),
    "ConstantLR": partial(lr_scheduler.ConstantLR, total_iters=3),
    "LinearLR": partial(lr_scheduler.LinearLR, total_iters=5),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=8),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.02, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=12),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_moves_every_group(regression: Module, fit: Fit, name: str) -> None:
    rates: list[list[float]] = []

    def configure(groups: list[dict[str, Any]]) -> dict[str, Any]:
        optimizer = muon(groups)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append([g["lr"] for g in o.param_groups]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}}

    module = regression(configure)
    fit(module)
    assert len(rates) == 10
    assert len({round(rate, 9) for step in rates for rate in step}) > 1
    assert all(len(set(step)) == 1 for step in rates)
    assert weights(module).isfinite().all()


def test_reduce_on_plateau(regression: Module, fit: Fit) -> None:
    def configure(groups: list[dict[str, Any]]) -> dict[str, Any]:
        optimizer = muon(groups)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, threshold_mode="abs")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}

    trainer = fit(regression(configure), max_epochs=3, limit_val_batches=1.0)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.02 * 0.1**2] * 3)


def test_resume_through_a_checkpoint_is_bit_equal(regression: Module, fit: Fit, tmp_path: Path) -> None:
    def configure(groups: list[dict[str, Any]]) -> dict[str, Any]:
        optimizer = muon(groups)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    straight, first, second = regression(configure), regression(configure), regression(configure, seed=9)
    end = fit(straight, max_epochs=2)
    fit(first, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(second, max_epochs=2, ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(weights(straight), weights(second))
    assert straight.losses[10:] == second.losses
    saved, again = end.optimizers[0].state_dict(), resumed.optimizers[0].state_dict()
    assert saved["param_groups"] == again["param_groups"]
    for key, state in saved["state"].items():
        assert all(torch.equal(value, again["state"][key][name]) for name, value in state.items())


def test_two_optimizers_by_hand(fit: Fit, regression: Module) -> None:
    """Manual optimization: a group each for two of them."""

    class Manual(regression):  # type: ignore[valid-type,misc]
        automatic_optimization = False

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

    module = Manual(lambda groups: [muon(groups[:1]), muon(groups[1:])])
    together = regression(muon)
    fit(module)
    fit(together)
    assert torch.equal(weights(module), weights(together))
