"""Samples, tokens and operations a second, by a clock that the test moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon.callbacks import SpeedMonitor, optimizer_time
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(optimizer_time, "time", clock)
    return clock


class Timed(LightningModule):
    """A batch of 4 samples takes 2 s, of validation 100 s; the first batch takes 50 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.net, self.clock = nn.Linear(8, 16, bias=False), clock

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.clock.now += 50 if self.trainer.global_step == batch_idx == 0 else 2
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.clock.now += 100

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(48, 8)), batch_size=4)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_leave_out_validation_and_the_first_step(
    clock: Clock, fit: Fit, tensorboard: TensorBoardLogger, events: Any, accumulate: int
) -> None:
    module: Any = Timed(clock)
    module.tokens_per_sample = 10
    module.flops_per_batch = 6e12
    options = {"limit_val_batches": 1, "val_check_interval": 2, "log_every_n_steps": 3, "max_epochs": 2}
    callbacks = [SpeedMonitor(peak_flops=12e12)]
    fit(module, callbacks=callbacks, logger=tensorboard, accumulate_grad_batches=accumulate, **options)
    found = events(module.trainer).scalars()
    steps = [step for step, _ in found["throughput/samples_per_second"]]
    assert steps == [step - 1 for step in range(3, 24 // accumulate + 1, 3)]
    values = {name: {value for _, value in found[f"throughput/{name}"]} for name in ("tflops", "mfu")}
    assert values == {"tflops": {3.0}, "mfu": {0.25}}
    assert {value for _, value in found["throughput/samples_per_second"]} == {2.0}
    assert {value for _, value in found["throughput/tokens_per_second"]} == {20.0}


def test_the_operations_of_the_first_batch(clock: Clock, fit: Fit) -> None:
    module = Timed(clock)
    trainer = fit(module, callbacks=[SpeedMonitor(measure_flops=True)], max_steps=4)
    # A multiply and an add for each weight and sample, forward and for the gradient of the weights.
    assert float(watched(trainer)["throughput/tflops"]) == pytest.approx(2 * 2 * 8 * 16 * 4 / 2 / 1e12)
    assert "throughput/mfu" not in watched(trainer)  # the peak of a CPU is not known


def test_what_is_not_known_is_left_out(clock: Clock, fit: Fit) -> None:
    """A compiled network is not counted; a batch without tensors has no size; without a cadence nothing is logged."""
    compiled = Timed(clock)
    compiled.net.compile(backend="eager")
    trainer = fit(compiled, callbacks=[SpeedMonitor(measure_flops=True)], max_steps=4)
    assert {name for name in watched(trainer) if "throughput" in name} == {"throughput/samples_per_second"}
    trainer = fit(Timed(clock), callbacks=[SpeedMonitor()], max_steps=4, log_every_n_steps=0)
    assert not watched(trainer)


def test_counting_ends_with_an_error(clock: Clock, fit: Fit) -> None:
    class Failing(Callback):
        def on_before_backward(self, *_: object) -> None:
            raise ValueError("on the way")

    monitor = SpeedMonitor(measure_flops=True)
    with pytest.raises(ValueError, match="on the way"):
        fit(Timed(clock), callbacks=[monitor, Failing()])
    assert monitor._counter is None


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"peak_flops": 0}, {"peak_flops": "much"}])
def test_wrong_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(options))):
        SpeedMonitor(**options)
