"""What AutoWeightDecay says of its decisions, in numbers of the run."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_muon.callbacks import AutoWeightDecay
from lightning_muon.callbacks.decay.target_decay import Aim, Bf16Target, TargetDecay
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

growing = partial(MuonAdamW, lr=0.2, weight_decay=0.0)
steer = partial(AutoWeightDecay, horizon=50, ramp_steps=20)


class GroupRMS(Callback):
    """The RMS of the Muon group after each step, in float64."""

    def __init__(self) -> None:
        self.rms: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        (group,) = [group for group in trainer.optimizers[0].param_groups if group["algorithm"] == "muon"]
        entries: Tensor = torch.cat([p.detach().double().flatten() for p in group["params"]])
        self.rms.append(float(entries.square().mean().sqrt()))


def test_decisions_are_told_with_their_reason(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The numbers of the line are those of the run; nothing is said while little changes."""
    watch, options = GroupRMS(), {"max_epochs": 60, "log_every_n_steps": 5, "logger": tensorboard}
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer = fit(regression(growing), callbacks=[steer(target_rms=1.5), watch], **options)
    texts = events(trainer).texts("weight_decay/decisions")
    assert texts == [r.getMessage() for r in caplog.records if r.getMessage().startswith("AutoWeightDecay")]
    rms = watch.rms[9]
    growth = 100 * math.log(rms / watch.rms[4]) / 5  # without decay yet, and smoothing has nothing to smooth
    assert texts[0].startswith("AutoWeightDecay, step 9: weight decay of matrix goes to 0: ")
    assert f"its weight RMS is {rms:.3g}, the target 1.5; updates alone change it by {growth:+.2g} % a step" in texts[0]
    assert "which the bounds make 0. All change over from their own decay in 20 steps." in texts[0]
    assert 2 <= len(texts) <= 8
    assert "step" in texts[1]
    assert "bounds" not in texts[1]


def test_of_many_matrices_one_line_tells(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    trainer = fit(regression(growing), callbacks=[steer(target_rms=0.1, per="matrix")], logger=tensorboard)
    first = events(trainer).texts("weight_decay/decisions")[0]
    assert first.count("the target 0.1") == 1
    assert all(name in first for name in ("net.0.weight", "net.2.weight"))
    assert "Likewise" in first


def test_below_the_target_both_decays_are_told(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """The one that would hold the weights where they are, and that which will hold them at the target."""
    watch, options = GroupRMS(), {"log_every_n_steps": 5, "logger": tensorboard}
    small = partial(MuonAdamW, lr=0.05, weight_decay=0.0)
    trainer = fit(regression(small), callbacks=[steer(target_rms=0.3), watch], **options)
    first, second = watch.rms[4], watch.rms[9]
    growth = math.log(second / first) / 5
    holding, steering = growth / 0.05, math.log(second / 0.3) / 50 / 0.05
    assert second < 0.3
    assert (
        f"updates alone change it by {100 * growth:+.2g} % a step, to hold it takes a decay of {holding:.3g}, at the"
        f" target {holding * second / 0.3:.3g}, to get to the target {steering:+.2g}: "
    ) in events(trainer).texts("weight_decay/decisions")[0]


@pytest.mark.parametrize(
    ("bounds", "lr", "words"),
    [
        ((0.0, 1000.0), 0.1, ": 46.1; as a step takes half of the weights at most, 5"),
        ((0.0, 3.0), 0.1, ": 46.1, which the bounds make 3"),
        ((0.0, 7.0), 0.1, ": 46.1, which the bounds make 7; as a step takes half of the weights at most, 5"),
        (
            (0.0, 1000.0),
            0.001,
            ": 4.61e+03, which the bounds make 1e+03; as a step takes half of the weights at most, 500",
        ),
        ((0.0, 100.0), 0.001, ": 4.61e+03, which the bounds make 100"),
    ],
)
def test_what_keeps_a_decay_small_is_named(bounds: tuple[float, float], lr: float, words: str) -> None:
    """A hundred times the target, which is to be reached in a step; the updates do nothing."""
    control = TargetDecay()
    control.measure(100.0, [], 1.0, Aim(1, 0.0, bounds))
    control.took(lr, 0.0)
    assert str(control.measure(100.0, [], 1.0, Aim(1, 0.0, bounds))).endswith(words)


def rates_of(planned: float, *lrs: float) -> list[float]:
    target = Bf16Target()
    found = []
    for lr in lrs:
        target.saw_lr(lr, planned)
        found.append(target.lr)
    return found


def test_the_learning_rate_of_full_updates() -> None:
    """What a schedule starts from, unless it turns out to have another plan."""
    assert rates_of(0.0, 0.02, 0.02, 0.01) == [0.02] * 3  # no schedule; someone sets it
    assert rates_of(0.02, 0.0199, 0.01, 0.0) == [0.02] * 3  # a cosine
    assert rates_of(0.02, 0.001, 0.01, 0.02, 0.01) == [0.02] * 4  # after a warm-up
    assert rates_of(0.5, 0.02, 0.25, 0.4, 0.1) == [0.5] * 4  # a cycle that is measured now and then
    assert rates_of(1.0, 0.02, 0.02, 0.02) == [1.0, 0.02, 0.02]  # LambdaLR over lr=1
    assert rates_of(1.0, 0.01, 0.02, 0.02, 0.01) == [1.0, 1.0, 0.02, 0.02]


def test_a_schedule_over_an_lr_of_one_has_a_target_of_its_own(regression: Module, fit: Fit) -> None:
    def absolute(groups: list[dict[str, Any]]) -> dict[str, Any]:
        optimizer = MuonAdamW(groups, lr=1.0, weight_decay=0.0, orthogonalizer="svd")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.005)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    watch = GroupRMS()
    fit(regression(absolute), callbacks=[steer(target_rms="bf16"), watch], max_epochs=60, log_every_n_steps=5)
    assert watch.rms[400:] == pytest.approx([2**7 * 0.005 * 0.2] * 200, rel=0.1)


def test_the_logged_decay_is_that_of_the_step(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """Not of the next one, which a schedule has set meanwhile."""
    taken: list[float] = []

    class Scheduled(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            optimizer.param_groups[0]["weight_decay"] = 0.01 * (trainer.global_step + 1)

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.optimizers[0].register_step_post_hook(
                lambda optimizer, *_: taken.append(optimizer.param_groups[0]["weight_decay"])
            )

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 77.0

    trainer = fit(regression(growing), callbacks=[Scheduled(), AutoWeightDecay(limit=100.0)], logger=tensorboard)
    logged = [value for _, value in events(trainer).scalars()["weight_decay/matrix"]]
    assert logged == pytest.approx(taken)
    assert len(set(taken)) == 10
