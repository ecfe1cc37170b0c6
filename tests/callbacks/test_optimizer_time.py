"""The optimizer's share of the step, by a clock that the test moves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks import OptimizerTimeMonitor, optimizer_time
from lightning_muon.optim import MuonAdamW
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]


class Clock:
    """Time that passes only when someone says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.looks = 0

    def perf_counter(self) -> float:
        self.looks += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    torch.optim.SGD(
        [torch.zeros(1)]
    )  # from now on hooks are called in SGD's own step, also when a derived one calls it
    clock = Clock()
    monkeypatch.setattr(optimizer_time, "time", clock)
    return clock


class Slow(torch.optim.SGD):
    """An optimizer whose update takes a second, beside what its closure takes."""

    def __init__(self, groups: Any, clock: Clock) -> None:
        super().__init__([p for group in groups for p in group["params"]], lr=1e-3)
        self.clock = clock

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.clock.now += 1.0
        return loss


def timed(module_class: Any, clock: Clock, step: float = 3.0, clipping: float = 0.0) -> Any:
    """A module whose training step takes so many seconds a batch, and clipping so many a step."""

    class Timed(module_class):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            clock.now += step
            return super().training_step(batch, batch_idx)

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            clock.now += clipping

    return Timed


def shares(events: Any, trainer: Trainer) -> list[tuple[int, Any]]:
    return events(trainer).scalars()["optimizer_share"]


@pytest.mark.parametrize(
    ("options", "every", "clipping", "expected"),
    [
        ({}, 2, 0.0, [(step, 1 / 4) for step in (1, 3, 5, 7, 9)]),
        ({}, 5, 0.0, [(step, 1 / 4) for step in (4, 9)]),
        ({}, 1, 0.0, [(step, 1 / 4) for step in range(10)]),
        ({}, 2, 0.5, [(step, 1.5 / 4.5) for step in (1, 3, 5, 7, 9)]),
        ({"accumulate_grad_batches": 2}, 2, 0.0, [(step, 1 / 7) for step in (1, 3)]),
        ({"accumulate_grad_batches": 2}, 1, 0.0, [(step, 1 / 7) for step in range(5)]),
        ({"accumulate_grad_batches": 3}, 2, 0.0, [(1, 1 / 10), (3, 1 / 10)]),
    ],
)
def test_values(
    regression: Module,
    fit: Fit,
    tensorboard: TensorBoardLogger,
    events: Any,
    clock: Clock,
    options: Any,
    every: int,
    clipping: float,
    expected: list[tuple[int, float]],
) -> None:
    module = timed(regression, clock, clipping=clipping)(lambda groups: Slow(groups, clock))
    trainer = fit(module, callbacks=[OptimizerTimeMonitor(every)], logger=tensorboard, **options)
    assert shares(events, trainer) == [(step, pytest.approx(share)) for step, share in expected]


class Busy(Callback):
    """Takes its time: another monitor in the steps that are logged, data and validation between the batches."""

    def __init__(self, clock: Clock, every: int) -> None:
        self.clock = clock
        self.every = every

    def measure(self, trainer: Trainer) -> None:
        if (trainer.global_step + 1) % self.every == 0:
            self.clock.now += 100.0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.measure(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.measure(trainer)

    def on_validation_end(self, *_: Any) -> None:
        self.clock.now += 1000.0


@pytest.mark.parametrize("place", [0, 1])
def test_what_others_do_in_logged_steps_is_not_counted(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, clock: Clock, place: int
) -> None:
    callbacks: list[Callback] = [OptimizerTimeMonitor(2)]
    callbacks.insert(place, Busy(clock, 2))
    module = timed(regression, clock)(lambda groups: Slow(groups, clock))
    trainer = fit(module, callbacks=callbacks, logger=tensorboard, limit_val_batches=1, val_check_interval=1)
    assert shares(events, trainer) == [(step, 0.25) for step in (1, 3, 5, 7, 9)]


def test_where_every_step_is_logged_it_is(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, clock: Clock
) -> None:
    """Behind the monitor in the list, so that all 200 seconds are in the step, and 100 in what follows the backward."""
    module = timed(regression, clock)(lambda groups: Slow(groups, clock))
    trainer = fit(module, callbacks=[OptimizerTimeMonitor(1), Busy(clock, 1)], logger=tensorboard)
    assert shares(events, trainer) == [(step, pytest.approx(101 / 204)) for step in range(10)]


def test_several_optimizers_are_added_up(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, clock: Clock
) -> None:
    """Two steps of the one, and one of the other, in a batch."""
    module = timed(adversaries, clock, step=6.0)(lambda groups, _: Slow(groups, clock), lambda _: (2, 1))
    trainer = fit(module, callbacks=[OptimizerTimeMonitor(2)], logger=tensorboard)
    assert shares(events, trainer) == [(step, pytest.approx(3 / 9)) for step in (1, 3, 5, 7, 9)]


def test_accumulation_by_hand(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, clock: Clock
) -> None:
    """A step at every third batch: of each step all three batches count, also where the due one is the last."""
    module = timed(adversaries, clock)(lambda groups, _: Slow(groups, clock), lambda batch: (batch % 3 == 2, 0))
    trainer = fit(module, callbacks=[OptimizerTimeMonitor(4)], logger=tensorboard, max_epochs=2)
    assert shares(events, trainer) == [(step, pytest.approx(1 / 10)) for step in (7, 15)]


def test_a_skipped_step_is_no_update(
    regression: Module, fit: Fit, scaled: Any, tensorboard: TensorBoardLogger, events: Any
) -> None:
    class Overflow(regression):  # type: ignore[valid-type,misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("inf")

    monitor = OptimizerTimeMonitor(2)
    trainer = fit(Overflow(MuonAdamW), plugins=[scaled()], callbacks=[monitor], logger=tensorboard)
    assert "optimizer_share" not in events(trainer).scalars()


def test_a_real_clock(regression: Module, fit: Fit) -> None:
    trainer = fit(regression(partial(MuonAdamW, lr=0.02)), callbacks=[OptimizerTimeMonitor(2)])
    assert 0 < watched(trainer)["optimizer_share"] < 1


@pytest.mark.parametrize(
    ("make", "of_matrix", "of_other"),
    [
        # Two moments in float32, and the number of steps of each parameter.
        (torch.optim.AdamW, lambda p: 8 * p.numel() + 4, lambda p: 8 * p.numel() + 4),
        (torch.optim.SGD, lambda _: 0, lambda _: 0),
        (MuonAdamW, lambda p: 4 * p.numel(), lambda p: 8 * p.numel() + 4),
        # A byte an element, and a scale a row; small parameters of AdamW stay as they are.
        (partial(MuonAdamW, momentum_dtype="int8"), lambda p: p.numel() + 4 * len(p), lambda p: 8 * p.numel() + 4),
    ],
)
def test_the_memory_of_the_state_is_logged_once(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, make: Any, of_matrix: Any, of_other: Any
) -> None:
    trainer = fit(regression(make), callbacks=[OptimizerTimeMonitor(2)], logger=tensorboard)
    expected = [
        (of_matrix if group["algorithm"] == "muon" else of_other)(parameter)
        for group in trainer.optimizers[0].param_groups
        for parameter in group["params"]
    ]
    assert events(trainer).scalars()["optimizer_state/bytes"] == [(1, sum(expected))]


def test_state_in_lists_counts_and_shared_tensors_once() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    shared = torch.zeros(3, dtype=torch.float64)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"bases": [shared, [], torch.zeros(5)], "last": shared}
    assert optimizer_time.state_bytes([optimizer, optimizer]) == 3 * 8 + 5 * 4


def test_off_its_cadence_it_looks_at_no_clock_and_leaves_no_hook(regression: Module, fit: Fit, clock: Clock) -> None:
    hooks: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            hooks.append(len(trainer.optimizers[0]._optimizer_step_post_hooks))

    def module() -> LightningModule:
        return regression(lambda groups: Slow(groups, clock))

    fit(module(), callbacks=[Count(), OptimizerTimeMonitor(20)])
    assert clock.looks == 0
    trainer = fit(module(), callbacks=[OptimizerTimeMonitor(5), Count()])
    assert clock.looks == 2 * 5  # at two steps: both ends of the batch, and of the update, whose hook is called twice
    assert set(hooks) == {0}
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_an_interrupted_run_leaves_nothing_for_the_next(regression: Module, fit: Fit, clock: Clock) -> None:
    class Interrupted(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.now += 50.0
            raise RuntimeError("stop")

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            optimizers.extend(trainer.optimizers)

    optimizers: list[Optimizer] = []
    monitor = OptimizerTimeMonitor(2)
    module = timed(regression, clock)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module(lambda groups: Slow(groups, clock)), callbacks=[Keep(), Interrupted(), monitor])
    assert not optimizers[0]._optimizer_step_post_hooks
    trainer = fit(module(lambda groups: Slow(groups, clock)), callbacks=[monitor])
    assert float(watched(trainer)["optimizer_share"]) == pytest.approx(0.25)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(MisconfigurationException, match="OptimizerTimeMonitor: every_n_steps must be at least 1"):
        OptimizerTimeMonitor(0)
