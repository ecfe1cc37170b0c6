"""The decay that AutoWeightDecay gives a group for a step, and the group's own between steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_muon.callbacks import AutoWeightDecay
from lightning_muon.optim import MuonAdamW
from tests.callbacks.decay_runs import Script, decay, healthy, unstable

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]


class Applied(Callback):
    """The decay that each step takes, by algorithm."""

    def __init__(self, optimizer: int = 0) -> None:
        self.optimizer = optimizer
        self.decays: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[self.optimizer].register_step_pre_hook(self.look)

    def look(self, optimizer: Any, *_: Any) -> None:
        self.decays.append({group["algorithm"]: group["weight_decay"] for group in optimizer.param_groups})

    def curve(self) -> list[float]:
        return [decays["muon"] for decays in self.decays]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_ramp_goes_up_and_back_step_by_step(regression: Module, fit: Fit, accumulate: int) -> None:
    auto = AutoWeightDecay(limit=1.0, weight_decay=0.5, smoothing=0.0, horizon=0, ramp_steps=4)
    values = [2.0] * 5 + [0.1] * 5
    seen = Applied()
    fit(
        regression(healthy),
        callbacks=[Script(values), auto, seen],
        max_epochs=accumulate,
        accumulate_grad_batches=accumulate,
    )
    # an epoch of ten batches ends with a step: four of them when accumulating three
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1] + [0.1] * 2 * (accumulate > 1)
    assert seen.curve() == pytest.approx(expected)


def test_only_muon_groups_are_touched(regression: Module, fit: Fit) -> None:
    """And these only while the optimizer steps."""
    seen = Applied()
    trainer = fit(regression(unstable), max_epochs=3, callbacks=[AutoWeightDecay(limit=0.1, ramp_steps=1), seen])
    assert seen.decays[-1] == {"muon": 0.5, "adamw": 0.0}
    assert {group["weight_decay"] for group in trainer.optimizers[0].param_groups} == {0.0}


def test_a_group_with_more_decay_keeps_it(regression: Module, fit: Fit) -> None:
    auto = AutoWeightDecay(limit=0.1, weight_decay=0.05, ramp_steps=1)
    seen = Applied()
    fit(regression(healthy), callbacks=[auto, seen])
    assert auto.active
    assert seen.curve() == pytest.approx([0.1] * 10)


def test_a_decay_that_someone_else_sets_becomes_the_new_base(regression: Module, fit: Fit) -> None:
    class Someone(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.02

    seen = Applied()
    auto = AutoWeightDecay(limit=1e-6, weight_decay=0.5, ramp_steps=2)
    trainer = fit(regression(healthy), callbacks=[Someone(), auto, seen])
    assert decay(trainer) == pytest.approx(0.02)
    assert seen.curve() == pytest.approx([0.1, 0.3, *[0.5] * 8])
    fit(regression(healthy), callbacks=[Someone(), AutoWeightDecay(limit=100.0), seen])
    assert seen.curve()[10:] == pytest.approx([0.1] * 5 + [0.02] * 5)


def test_a_relative_schedule_of_someone_else_keeps_its_meaning(regression: Module, fit: Fit) -> None:
    class Someone(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["weight_decay"] *= 0.5

    seen = Applied()
    auto = AutoWeightDecay(limit=1.0, weight_decay=0.5, smoothing=0.0, horizon=0, ramp_steps=2)
    values = [2.0] * 3 + [0.1] * 3
    trainer = fit(regression(healthy), callbacks=[Script(values), auto, Someone(), seen], limit_train_batches=6)
    assert decay(trainer) == pytest.approx(0.1 / 64)
    halves = [0.1 / 2**step for step in range(6)]
    strengths = [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    assert seen.curve() == pytest.approx([own + s * (0.5 - own) for own, s in zip(halves, strengths, strict=True)])


def test_a_decay_set_during_the_step_is_not_taken_back(regression: Module, fit: Fit) -> None:
    class Someone(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.02

    trainer = fit(regression(healthy), callbacks=[Someone(), AutoWeightDecay(limit=1e-6, ramp_steps=2)])
    assert decay(trainer) == pytest.approx(0.02)


def test_two_optimizers_are_one_course(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """Networks of different size at rest: no growth; each group has its own decay, and goes along one ramp."""
    module = adversaries(lambda groups, place: MuonAdamW(groups, lr=1e-9, weight_decay=(0.1, 0.0)[place]))
    with torch.no_grad():
        module.critic[0].weight.fill_(4.0)
    quiet = AutoWeightDecay(limit=5.0, horizon=1000)
    fit(module, callbacks=[quiet], max_epochs=2)
    assert not quiet.active
    assert quiet.state_dict()["measurements"] == 20
    assert quiet.state_dict()["smoothed"] == pytest.approx(4.0)
    assert quiet.state_dict()["growth"] == pytest.approx(0.0, abs=1e-6)

    auto = AutoWeightDecay(limit=3.0, weight_decay=0.5, ramp_steps=4)
    seen = [Applied(0), Applied(1)]
    trainer = fit(module, callbacks=[auto, *seen], logger=tensorboard, limit_train_batches=6)
    expected = [[0.1, 0.2, 0.3, 0.4, 0.5, 0.5], [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]]
    assert [one.curve() for one in seen] == [pytest.approx(curve) for curve in expected]
    assert [optimizer.param_groups[0]["weight_decay"] for optimizer in trainer.optimizers] == [0.1, 0.0]
    scalars = events(trainer).scalars()
    for tag, curve in zip(("weight_decay/matrix", "weight_decay/matrix-1"), expected, strict=True):
        assert scalars[tag] == [(step, pytest.approx(value)) for step, value in enumerate(curve)]


def test_several_steps_a_batch_are_one_on_the_ramp(adversaries: Module, fit: Fit) -> None:
    module = adversaries(lambda groups, _: MuonAdamW(groups, weight_decay=0.1), lambda _: (3, 1))
    seen = Applied()
    auto = AutoWeightDecay(limit=1e-6, weight_decay=0.5, ramp_steps=4)
    fit(module, callbacks=[auto, seen], limit_train_batches=3)
    assert seen.curve() == pytest.approx([0.1] * 3 + [0.2] * 3 + [0.3] * 3)
    assert auto.state_dict()["measurements"] == 3


def test_a_ramp_is_not_in_the_optimizer_of_a_checkpoint(regression: Module, fit: Fit, tmp_path: Path) -> None:
    """Resumed with another limit, without the callback, or with a decay that was changed meanwhile."""
    path = str(tmp_path / "ramp.ckpt")
    trainer = fit(regression(healthy), callbacks=[AutoWeightDecay(limit=1e-6, ramp_steps=20)])
    trainer.save_checkpoint(path)
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert groups[0]["weight_decay"] == 0.1

    seen = Applied()
    fit(regression(healthy), max_epochs=2, callbacks=[AutoWeightDecay(limit=100.0), seen], ckpt_path=path)
    fit(regression(healthy), max_epochs=2, callbacks=[seen], ckpt_path=path)
    assert seen.curve() == pytest.approx([0.1] * 20)

    class CommandLine(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.3  # where the ramp stood

    seen = Applied()
    auto = AutoWeightDecay(limit=1e-6, ramp_steps=20)
    trainer = fit(regression(healthy), max_epochs=2, callbacks=[CommandLine(), auto, seen], ckpt_path=path)
    assert seen.curve() == pytest.approx([0.3 + 0.2 * (10 + n) / 20 for n in range(10)])
    assert decay(trainer) == 0.3


def test_an_interrupted_step_leaves_the_own_decay(regression: Module, fit: Fit) -> None:
    class Interrupted(regression):  # type: ignore[valid-type,misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 5:
                raise RuntimeError("stop")

    module = Interrupted(healthy)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, callbacks=[AutoWeightDecay(limit=1e-6, ramp_steps=2)])
    optimizer = module.trainer.optimizers[0]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_second_fit_starts_afresh(regression: Module, fit: Fit) -> None:
    """Whether the first was quiet or not, and also when the trainer counts on."""
    quiet = AutoWeightDecay(limit=100.0)
    seen = Applied()
    fit(regression(healthy), max_epochs=5, callbacks=[quiet])
    fit(regression(healthy), callbacks=[quiet, seen])
    assert seen.curve() == pytest.approx([0.1] * 10)

    loud, seen = AutoWeightDecay(limit=1e-6, ramp_steps=20), Applied()
    trainer = fit(regression(healthy), callbacks=[loud, seen])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(regression(healthy))
    assert seen.curve()[:10] == pytest.approx(seen.curve()[10:])
