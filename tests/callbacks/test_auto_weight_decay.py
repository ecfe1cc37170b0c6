"""Automatic weight decay with a limit: when it acts, when it rests, and what survives a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_muon.callbacks import AutoWeightDecay, WeightRMSMonitor
from tests.callbacks.decay_runs import Script, decay, healthy, unstable
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]


def test_an_unstable_run_is_stopped_from_growing(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """Without decay and with a large lr the RMS keeps growing; with the callback it settles."""
    options = {"max_epochs": 20, "log_every_n_steps": 5}
    free = fit(regression(unstable), callbacks=[WeightRMSMonitor()], **options)
    grown = float(watched(free)["weight_rms/max"])

    auto = AutoWeightDecay(limit=0.8, weight_decay=0.5, ramp_steps=20, horizon=0)
    trainer = fit(regression(unstable), callbacks=[auto, WeightRMSMonitor()], logger=tensorboard, **options)
    found = events(trainer)
    scalars = found.scalars()
    held = [value for _, value in scalars["weight_rms/max"]]
    assert grown > 1.5 * held[-1]
    assert held[-1] < 1.1 * held[len(held) // 2]
    assert "AutoWeightDecay, step" in found.texts("weight_decay/decisions")[0]
    assert "is over the limit of 0.8" in found.texts("weight_decay/decisions")[0]
    curve = [value for _, value in scalars["weight_decay/matrix"]]
    assert curve[0] == 0.0
    assert max(curve) == pytest.approx(0.5)


def test_a_healthy_run_is_left_alone(regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any) -> None:
    auto = AutoWeightDecay(limit=0.8)
    trainer = fit(regression(healthy), max_epochs=10, callbacks=[auto], logger=tensorboard)
    found = events(trainer)
    assert not auto.active
    curve = [value for _, value in found.scalars()["weight_decay/matrix"]]
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


def decisions(regression: Module, fit: Fit, values: list[float], max_epochs: int = 1, **options: Any) -> list[bool]:
    """Whether the decay is on after each step of a script."""
    active: list[bool] = []
    auto = AutoWeightDecay(**{"limit": 1.0, "smoothing": 0.0, "horizon": 0, **options})

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            active.append(auto.active)

    batches = len(values) // max_epochs
    fit(
        regression(healthy),
        max_epochs=max_epochs,
        limit_train_batches=batches,
        callbacks=[Script(values), auto, Watch()],
    )
    return active


def test_hysteresis(regression: Module, fit: Fit) -> None:
    """On above the limit, off only below the release; in between nothing changes."""
    values = [0.9, 1.1, 0.9, 0.85, 0.79, 0.9, 0.99, 1.01]
    expected = [False, True, True, True, False, False, False, True]
    assert decisions(regression, fit, values, release=0.8) == expected


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
    assert decay(trainer) == 0.0
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


Measurements = list[tuple[int, float]]


def course_of(values: Measurements, smoothing: float) -> tuple[float, float]:
    """Smoothed RMS and growth after measurements (step, RMS), written as weighted sums."""

    def average(numbers: list[float]) -> float:
        weights = [(1 - smoothing) * smoothing**age for age in range(len(numbers) - 1)] + [
            smoothing ** (len(numbers) - 1)
        ]
        return sum(weight * number for weight, number in zip(weights, reversed(numbers), strict=True))

    smoothed = [average([value for _, value in values[: n + 1]]) for n in range(len(values))]
    steps = [step for step, _ in values]
    slopes = [(smoothed[n + 1] - smoothed[n]) / (steps[n + 1] - steps[n]) for n in range(len(values) - 1)]
    return smoothed[-1], average(slopes) if slopes else 0.0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 3])
def test_the_course_is_the_smoothed_largest_rms_and_its_growth_per_step(
    regression: Module, fit: Fit, accumulate: int, every: int
) -> None:
    """Of two matrices the second is larger; steps, not batches, are counted."""
    script = [0.1, 0.3, 0.2, 0.6, 0.5, 0.9, 0.4, 0.7, 0.8, 1.0]
    auto = AutoWeightDecay(limit=100.0, smoothing=0.6, every_n_steps=every)
    courses: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step % every == 0 and trainer.global_step > every * len(courses):
                courses.append(auto.state_dict())

    callbacks = [Script(script, second=2.0), auto, Watch()]
    fit(regression(healthy), callbacks=callbacks, max_epochs=accumulate, accumulate_grad_batches=accumulate)
    measured = [(step, 2.0 * script[step]) for step in range(10) if (step + 1) % every == 0]
    assert len(courses) == len(measured)
    for count, course in enumerate(courses, start=1):
        smoothed, growth = course_of(measured[:count], 0.6)
        assert course["measurements"] == count
        assert course["measured_at"] == measured[count - 1][0]
        assert course["smoothed"] == pytest.approx(smoothed, rel=1e-5)
        assert course["growth"] == pytest.approx(growth, rel=1e-4)


def test_growth_acts_from_the_fifth_measurement_on(regression: Module, fit: Fit) -> None:
    """Growing by 0.1 a step and looking ten steps ahead, the limit of 2 is foreseen at once; four are too few."""
    active = decisions(regression, fit, [0.1 * n for n in range(1, 9)], limit=1.2, horizon=10)
    assert active == [False] * 4 + [True] * 4


def test_growth_is_per_step(regression: Module, fit: Fit) -> None:
    """Measured at every second step, 0.01 a step for ten steps stays under the limit; 0.02 for ten would not."""
    values = [0.01 * n for n in range(1, 25)]
    active = decisions(regression, fit, values, limit=0.39, horizon=10, every_n_steps=2, max_epochs=3)
    assert active == [False] * 24
    active = decisions(regression, fit, values, limit=0.29, horizon=10, every_n_steps=2, max_epochs=3)
    assert active.index(True) == 19  # 0.20 + 10 · 0.01 > 0.29


def test_over_the_limit_is_over_the_limit(regression: Module, fit: Fit) -> None:
    """A jump over the limit counts, though the averaged growth still points down."""
    active = decisions(regression, fit, [0.99, 0.0, 0.0, 0.0, 0.0, 4.5], horizon=10, smoothing=0.9)
    assert active == [False] * 5 + [True]


def test_it_is_not_released_on_the_way_up(regression: Module, fit: Fit) -> None:
    """Under the release, but growing towards the limit: the decay stays on until the growth ends."""
    values = [1.1, 1.1, 1.1, 0.6, 0.7, 0.72, 0.72, 0.72]
    active = decisions(regression, fit, values, horizon=50, release=0.74)
    assert active == [True, True, True, False, True, True, False, False]


def test_the_decay_is_a_metric(regression: Module, fit: Fit) -> None:
    auto = AutoWeightDecay(limit=1e-6, weight_decay=0.5, ramp_steps=18)
    trainer = fit(regression(healthy), callbacks=[auto])
    assert float(watched(trainer)["weight_decay/matrix"]) == pytest.approx(0.1 + 0.4 * 9 / 18)


@pytest.mark.parametrize("log_every_n_steps", [0, 50])
def test_a_trainer_that_logs_nothing_is_still_controlled(regression: Module, fit: Fit, log_every_n_steps: int) -> None:
    auto = AutoWeightDecay(limit=1e-6)
    fit(regression(healthy), callbacks=[auto], max_epochs=10, log_every_n_steps=log_every_n_steps)
    assert auto.active
    assert auto.state_dict()["measurements"] == 2


def test_what_is_not_finite_is_told_and_ignored(regression: Module, fit: Fit) -> None:
    """The first matrix is NaN for two steps; the second is judged all along."""

    class Broken(Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in {2, 3}:
                trainer.optimizers[0].param_groups[0]["params"][0].fill_(torch.nan)

    auto = AutoWeightDecay(limit=1.0, smoothing=0.0, horizon=0)
    callbacks = [Script([0.5, 0.5, 0.5, 2.0]), Broken(), auto]
    with pytest.warns(UserWarning, match=r"step 1: the weight RMS is not finite for net\.0\.weight; nothing") as caught:
        fit(regression(healthy), callbacks=callbacks, limit_train_batches=4)
    assert sum("AutoWeightDecay" in str(one.message) for one in caught) == 1
    assert auto.active
    assert auto.state_dict()["measurements"] == 4
    assert auto.state_dict()["smoothed"] == pytest.approx(2.0)
