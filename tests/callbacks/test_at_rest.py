"""Where nothing asks a weight to move, nothing is said of its update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_muon.callbacks import UpdateRMSMonitor, WeightRMSMonitor
from lightning_muon.optim import MuonAdamW
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]


@pytest.fixture
def with_head_of_zeros(regression: Any) -> type[LightningModule]:
    """A network whose head is initialized with zeros: in the first step no gradient gets below it."""

    class WithHeadOfZeros(regression):  # type: ignore[valid-type,misc]
        def __init__(self, make_optimizer: Any) -> None:
            super().__init__(make_optimizer)
            nn.init.zeros_(self.net[4].weight)

    return WithHeadOfZeros


def warm_up(groups: list[dict[str, Any]], warm_steps: int, **options: Any) -> dict[str, Any]:
    optimizer = MuonAdamW(groups, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / warm_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def losses_told(caught: pytest.WarningsRecorder) -> list[str]:
    return [str(one.message) for one in caught if "rounded away" in str(one.message)]


def test_a_warm_up_from_zero_loses_nothing(regression: Module, fit: Fit, recwarn: pytest.WarningsRecorder) -> None:
    """The warning that is said once is not spent on the step with learning rate 0."""
    module = regression(partial(warm_up, warm_steps=1, lr=0.3))
    trainer = fit(module, callbacks=[WeightRMSMonitor()], precision="bf16-true", limit_train_batches=1)
    assert not losses_told(recwarn)
    assert "weight_rms/max" in watched(trainer)
    assert "lost_updates/max" not in watched(trainer)


def test_what_is_lost_after_a_warm_up_is_still_told(
    regression: Module, fit: Fit, recwarn: pytest.WarningsRecorder
) -> None:
    module = regression(partial(warm_up, warm_steps=1, lr=1e-6))
    fit(module, callbacks=[WeightRMSMonitor()], precision="bf16-true")
    (told,) = losses_told(recwarn)
    assert "WeightRMSMonitor, step 1: " in told


def test_without_gradient_no_update_is_lost(
    with_head_of_zeros: Module, fit: Fit, recwarn: pytest.WarningsRecorder
) -> None:
    fit(
        with_head_of_zeros(partial(MuonAdamW, lr=0.3, weight_decay=0.0)),
        callbacks=[WeightRMSMonitor()],
        precision="bf16-true",
    )
    assert not losses_told(recwarn)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_what_only_decays_is_no_drift(
    with_head_of_zeros: Module, fit: Fit, recwarn: pytest.WarningsRecorder, precision: str
) -> None:
    """The decay of the first step leaves a rounding, which is no update."""
    module = with_head_of_zeros(partial(MuonAdamW, lr=0.02, weight_decay=0.5))
    trainer = fit(module, callbacks=[UpdateRMSMonitor()], precision=precision, limit_train_batches=1)
    assert not [one for one in recwarn if "max_ratio" in str(one.message)]
    assert "update_rms/matrix" not in watched(trainer)
    assert "update_rms/head" in watched(trainer)


def test_momentum_alone_moves_what_adamw_updates(regression: Module, fit: Fit) -> None:
    """A gradient of zero lets the matrices of Muon rest, which is no update; AdamW goes on."""

    class Stopping(regression):  # type: ignore[valid-type,misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx) * (self.global_step < 9)
            return loss

    trainer = fit(Stopping(partial(MuonAdamW, lr=0.02)), callbacks=[UpdateRMSMonitor(every_n_steps=10)])
    assert 0.1 < float(watched(trainer)["update_rms/head"]) < 2
    assert "update_rms/matrix" not in watched(trainer)
