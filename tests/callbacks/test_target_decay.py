"""The decay that steers to a target, against float64 simulations of weights and updates."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_muon.callbacks.decay.target_decay import Aim, TargetDecay

FREE = Aim(horizon=100, smoothing=0.0, bounds=(-math.inf, math.inf))
ENTRIES = 64


def rms(weights: Tensor) -> float:
    return float(weights.square().mean().sqrt())


def normal(seed: int) -> Tensor:
    return torch.randn(ENTRIES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def holding(weights: Tensor, update: Tensor, lr: float) -> float:
    """The decay that holds the norm over one step, to first order."""
    return float((lr * update.square().sum() / 2 - weights @ update) / weights.square().sum())


@pytest.mark.parametrize("along", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize("applied", [0.0, 0.5, 20.0])
def test_one_step_tells_the_decay_that_would_have_held_the_norm(along: float, applied: float) -> None:
    """Whatever decay was applied, and with it the norm stays what it was, to the next order in the learning rate."""
    lr, weights = 1e-3, normal(0)
    update = normal(1) + along * weights
    control = TargetDecay()
    control.measure(rms(weights), [], 1e-9, FREE)
    control.took(lr, applied)
    reasoning = control.measure(rms((1 - lr * applied) * weights - lr * update), [], 1e-9, FREE)
    expected = holding(weights, update, lr)
    assert reasoning.holding == pytest.approx(expected, abs=lr * (applied * abs(expected) + 2))
    held = (1 - lr * reasoning.holding) * weights - lr * update
    free = weights - lr * update
    assert abs(rms(held) / rms(weights) - 1) < 2e-6 + 0.03 * abs(rms(free) / rms(weights) - 1)


def test_the_growth_of_an_interval_is_that_of_all_its_steps() -> None:
    """With other learning rates and decays at each step: the average by learning rate of the formula of one step."""
    weights, control = normal(0), TargetDecay()
    control.measure(rms(weights), [], 1e-9, FREE)
    total = lrs = 0.0
    for step in range(50):
        lr, decay = 1e-4 * (1 + step % 7), 0.1 * (step % 3)
        update = normal(step) - 0.2 * weights
        total += lr * holding(weights, update, lr)
        lrs += lr
        weights = (1 - lr * decay) * weights - lr * update
        control.took(lr, decay)
    assert control.measure(rms(weights), [], 1e-9, FREE).holding == pytest.approx(total / lrs, rel=2e-3)


def test_learning_rates_on_a_device_are_added_up_there() -> None:
    plain, waiting = TargetDecay(), TargetDecay()
    for control, lr in ((plain, 0.01), (waiting, torch.tensor(0.01, dtype=torch.float64))):
        control.measure(1.0, [], 0.5, FREE)
        for _ in range(3):
            control.took(lr, 0.2)
        assert isinstance(control.lr, type(lr))
        assert all(type(number) is float for number in (control.state()["lr"], control.state()["log_kept"]))
        control.measure(1.1, [], 0.5, FREE)
    assert waiting.decay == pytest.approx(plain.decay, rel=1e-12)


def walk(weights: Tensor, step: int) -> Tensor:
    """An update of RMS 1 at a right angle to the weights."""
    update = normal(1000 + step)
    update -= (update @ weights) / (weights @ weights) * weights
    return update / rms(update)


def drift(weights: Tensor, _: int) -> Tensor:
    """An update of RMS 0.2 that only makes the weights larger."""
    return -0.2 * weights / rms(weights)


def mixed(weights: Tensor, step: int) -> Tensor:
    return 0.2 * walk(weights, step) + 0.1 * drift(weights, step)


def constant(_: int) -> float:
    return 0.02


def warmup_and_cosine(step: int) -> float:
    """From 0 in 100 steps, and to a tenth in 2000."""
    return 0.02 * min(1.0, step / 100) * (0.55 + 0.45 * math.cos(math.pi * step / 2000))


def simulate(
    update: Callable[[Tensor, int], Tensor],
    schedule: Callable[[int], float],
    start: float,
    target: float,
    aim: Aim,
    every: int = 10,
) -> list[float]:
    """The RMS after each of 2000 steps."""
    weights, control, course = start * normal(0) / rms(normal(0)), TargetDecay(), []
    for step in range(2000):
        lr, decay = schedule(step), control.decay or 0.0
        weights = (1 - lr * decay) * weights - lr * update(weights, step)
        control.took(lr, decay)
        course.append(rms(weights))
        if (step + 1) % every == 0:
            control.measure(course[-1], [], target, aim)
    return course


@pytest.mark.parametrize("start", [0.05, 1.2])
@pytest.mark.parametrize("schedule", [constant, warmup_and_cosine])
@pytest.mark.parametrize("update", [walk, drift, mixed])
def test_the_rms_settles_at_the_target(
    update: Callable[[Tensor, int], Tensor], schedule: Callable[[int], float], start: float
) -> None:
    """Within 2 %, from below without passing it by more, and from above as fast as the horizon says."""
    target = 0.2
    course = simulate(update, schedule, start, target, Aim(100, 0.8, (0.0, 5.0)))
    free = simulate(update, schedule, start, target, Aim(100, 0.8, (0.0, 1e-9)))
    assert free[-1] > 1.2 * target
    assert course[1200:] == pytest.approx([target] * 800, rel=0.02)
    if start < target:
        assert max(course) < 1.05 * target


def test_the_distance_falls_to_one_over_e_within_the_horizon() -> None:
    course = simulate(drift, constant, 0.4, 0.2, Aim(200, 0.0, (0.0, 100.0)))
    assert math.log(course[300] / 0.2) == pytest.approx(math.log(course[100] / 0.2) / math.e, rel=0.06)


@pytest.mark.parametrize("horizon", [0, 1, 5])
def test_a_horizon_shorter_than_an_interval_does_not_swing(horizon: int) -> None:
    """The distance is never to fall by more than is there."""
    course = simulate(mixed, constant, 0.4, 0.2, Aim(horizon, 0.8, (0.0, 100.0)), every=20)
    assert course[200:] == pytest.approx([0.2] * 1800, rel=0.03)


def test_far_below_the_target_weights_grow_freely() -> None:
    """Young weights double in a few steps: to hold these would take a decay of more than 10."""
    aim = Aim(200, 0.8, (0.0, 1.0))
    course, free = (simulate(drift, constant, 0.001, target, aim) for target in (0.4, 1e9))
    assert course[:20] == pytest.approx(free[:20])
    assert course[-1] == pytest.approx(0.4, rel=0.02)


def measured(*values: float, lr: float = 0.1, target: float = 1.0, left_out: list[str] | None = None) -> TargetDecay:
    control = TargetDecay()
    for value in values:
        control.measure(value, left_out or [], target, Aim(100, 0.5, (0.0, 1.0)))
        control.took(lr, 0.0)
    return control


def test_two_measurements_are_needed() -> None:
    assert measured(2.0).decay is None
    assert measured(2.0, 2.1).decay is not None


@pytest.mark.parametrize("unknown", [math.nan, math.inf, 0.0])
def test_nothing_follows_from_what_is_not_known(unknown: float) -> None:
    """The decay stays, and growth is reckoned anew from the next value: else it would be that of both intervals."""
    before = measured(2.0, 2.0)
    after = measured(2.0, 2.0, unknown, 50.0, 50.0)
    assert measured(2.0, 2.0, unknown, 50.0).decay == before.decay
    assert after.growth == 0.0


def test_another_membership_is_another_beginning() -> None:
    aim, control = Aim(100, 0.0, (0.0, 1.0)), measured(2.0, 2.0)
    decay = control.decay
    assert control.measure(1.0, ["broken"], 1.0, aim) is None
    control.took(0.1, 0.0)
    assert control.decay == decay
    assert control.measure(1.0, ["broken"], 1.0, aim).growth == 0.0


def test_at_rest_the_decay_stays() -> None:
    """Without a learning rate nothing can be learnt, and the decay does nothing."""
    assert measured(2.0, 2.1, 2.2, lr=0.0).decay is None
    control = measured(2.0, 2.1)
    decay, control.lr = control.decay, 0.0
    assert control.measure(2.1, [], 1.0, FREE) is None
    assert control.decay == decay


def test_a_decay_takes_at_most_half_of_the_weights() -> None:
    control = TargetDecay()
    for _ in range(2):
        control.measure(100.0, [], 1.0, Aim(1, 0.0, (0.0, 1000.0)))
        control.took(0.1, 0.0)
    assert control.decay == 5.0


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_a_step_that_leaves_nothing_ends_the_decay(lr: float | Tensor) -> None:
    """Otherwise nothing could be measured any more, and the decay would stay for good."""
    control = measured(2.0, 2.1)
    assert control.decay > 0
    control.took(lr, 2.5)
    assert control.measure(3.0, [], 1.0, FREE) is None
    assert control.decay is None
    control.took(lr, 0.0)
    assert control.measure(3.0, [], 1.0, FREE).decay > 0


@pytest.mark.parametrize(
    ("told", "decay", "news"),
    [
        (None, 0.2, True),
        (0.2, 0.29, False),
        (0.2, 0.31, True),
        (0.2, 0.09, True),
        (0.002, 0.009, False),  # a hundredth of the range
        (0.9, 1.0, True),
        (1.0, 0.95, True),
        (0.0, 0.02, True),
        (0.005, 0.0, False),
    ],
)
def test_a_change_by_half_is_news_and_so_is_a_bound(told: float | None, decay: float, news: bool) -> None:
    assert TargetDecay(decay=decay, told=told).is_news((0.0, 1.0)) == news
