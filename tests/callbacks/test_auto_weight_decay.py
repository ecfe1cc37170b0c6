"""Automatic weight decay: when it acts, when it rests, and what survives a checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_muon.callbacks import AutoWeightDecay, WeightRMSMonitor
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

unstable = partial(MuonAdamW, lr=0.2, weight_decay=0.0)
healthy = partial(MuonAdamW, lr=1e-3, weight_decay=0.1)


def decay(trainer: Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["weight_decay"])


def test_an_unstable_run_is_stopped_from_growing(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """Without decay and with a large lr the RMS keeps growing; with the callback it settles."""
    options = {"max_epochs": 20, "log_every_n_steps": 5}
    free = fit(regression(unstable), callbacks=[WeightRMSMonitor()], **options)
    grown = float(free.callback_metrics["weight_rms/max"])

    auto = AutoWeightDecay(limit=0.8, weight_decay=0.5, ramp_steps=20, horizon=0)
    trainer = fit(regression(unstable), callbacks=[auto, WeightRMSMonitor()], logger=tensorboard, **options)
    found = events(trainer)
    scalars = found.scalars()
    held = [value for _, value in scalars["weight_rms/max"]]
    assert grown > 1.5 * held[-1]
    assert held[-1] < 1.1 * held[len(held) // 2]
    assert "AutoWeightDecay, step" in found.texts("weight_decay/decisions")[0]
    assert "is over the limit of 0.8" in found.texts("weight_decay/decisions")[0]
    curve = [value for _, value in scalars["weight_decay/muon"]]
    assert curve[0] == 0.0
    assert max(curve) == pytest.approx(0.5)


def test_a_healthy_run_is_left_alone(regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any) -> None:
    auto = AutoWeightDecay(limit=0.8)
    trainer = fit(regression(healthy), max_epochs=10, callbacks=[auto], logger=tensorboard)
    found = events(trainer)
    assert not auto.active
    curve = [value for _, value in found.scalars()["weight_decay/muon"]]
    assert curve == pytest.approx([0.1] * 100)
    assert not found.texts("weight_decay/decisions")


def test_growth_is_foreseen(regression: Module, fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    """Extrapolation acts before the limit is passed, and waiting for it acts later."""
    started = {}
    for horizon in (0, 50):
        auto = AutoWeightDecay(limit=1.5, horizon=horizon)
        caplog.clear()
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            fit(regression(unstable), max_epochs=10, callbacks=[auto])
        message = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("AutoWeightDecay"))
        started[horizon] = int(message.split("step ")[1].split(":")[0])
        assert ("will pass the limit of 1.5 within 50 steps" in message) == (horizon == 50)
    assert started[50] < started[0] - 10


class Script(Callback):
    """Sets the weights' RMS to a given value before each measurement."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        value = self.values[min(trainer.global_step, len(self.values)) - 1]
        for group in trainer.optimizers[0].param_groups:
            if group["algorithm"] == "muon":
                for weight in group["params"]:
                    weight.fill_(value)


def decisions(regression: Module, fit: Fit, values: list[float], **options: Any) -> list[bool]:
    active: list[bool] = []
    auto = AutoWeightDecay(limit=1.0, smoothing=0.0, horizon=0, **options)

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            active.append(auto.active)

    fit(regression(healthy), max_epochs=1, limit_train_batches=len(values), callbacks=[Script(values), auto, Watch()])
    return active


def test_hysteresis(regression: Module, fit: Fit) -> None:
    """On above the limit, off only below the release; in between nothing changes."""
    values = [0.9, 1.1, 0.9, 0.85, 0.79, 0.9, 0.99, 1.01]
    expected = [False, True, True, True, False, False, False, True]
    assert decisions(regression, fit, values, release=0.8) == expected


def test_the_ramp_goes_up_and_back_step_by_step(regression: Module, fit: Fit) -> None:
    curve: list[float] = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            curve.append(decay(trainer))

    auto = AutoWeightDecay(limit=1.0, weight_decay=0.5, smoothing=0.0, horizon=0, ramp_steps=4)
    values = [2.0] * 5 + [0.1] * 5
    fit(regression(healthy), callbacks=[Script(values), auto, Watch()])
    assert curve == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_only_muon_groups_are_touched(regression: Module, fit: Fit) -> None:
    trainer = fit(regression(unstable), max_epochs=3, callbacks=[AutoWeightDecay(limit=0.1, ramp_steps=1)])
    found = {group["algorithm"]: group["weight_decay"] for group in trainer.optimizers[0].param_groups}
    assert found == {"muon": 0.5, "adamw": 0.0}


def test_a_group_with_more_decay_keeps_it(regression: Module, fit: Fit) -> None:
    auto = AutoWeightDecay(limit=0.1, weight_decay=0.05, ramp_steps=1)
    trainer = fit(regression(healthy), callbacks=[auto])
    assert auto.active
    assert decay(trainer) == pytest.approx(0.1)


def test_a_decay_that_someone_else_sets_becomes_the_new_base(regression: Module, fit: Fit) -> None:
    class Someone(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.02

    trainer = fit(regression(healthy), callbacks=[Someone(), AutoWeightDecay(limit=100.0)])
    assert decay(trainer) == pytest.approx(0.02)


def test_state_and_decision_survive_a_checkpoint(regression: Module, fit: Fit, tmp_path: Path) -> None:
    """Twenty steps straight, and ten and ten through a checkpoint, in the middle of a ramp."""

    def callback() -> AutoWeightDecay:
        return AutoWeightDecay(limit=0.5, ramp_steps=12)

    straight, first, second = regression(unstable), regression(unstable), regression(unstable, seed=5)
    whole, begun, resumed = callback(), callback(), callback()
    fit(straight, max_epochs=2, callbacks=[whole])
    fit(first, max_epochs=1, callbacks=[begun]).save_checkpoint(tmp_path / "half.ckpt")
    assert 0.0 < begun.state_dict()["strength"] < 1.0
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    trainer = fit(second, max_epochs=2, callbacks=[resumed], ckpt_path=str(tmp_path / "half.ckpt"))
    assert whole.state_dict() == resumed.state_dict()
    assert decay(trainer) == whole.state_dict()["set_decay"]["muon"]
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("limit", 0.0),
        ("weight_decay", -0.1),
        ("horizon", -1),
        ("ramp_steps", 0),
        ("release", 1.0),
        ("smoothing", 1.0),
        ("every_n_steps", 0),
    ],
)
def test_bad_arguments_are_named(argument: str, value: float) -> None:
    with pytest.raises(MisconfigurationException, match=f"AutoWeightDecay: {argument} must be"):
        AutoWeightDecay(**{argument: value})


def test_a_run_without_muon_groups_is_refused(regression: Module, fit: Fit) -> None:
    module = regression(lambda groups: torch.optim.AdamW([p for group in groups for p in group["params"]]))
    with pytest.raises(MisconfigurationException, match="no parameter group has algorithm='muon'"):
        fit(module, callbacks=[AutoWeightDecay()])
