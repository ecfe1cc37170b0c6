"""Between the steps in which they measure, monitors look at nothing and wait for nothing."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_muon.callbacks import (
    AttentionLogitMonitor,
    AutoWeightDecay,
    GradientMonitor,
    MuonDashboard,
    OptimizerTimeMonitor,
    OrthogonalityMonitor,
    RunGuard,
    UpdateRMSMonitor,
    WeightRMSMonitor,
)
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

MONITORS: tuple[Any, ...] = (
    WeightRMSMonitor,
    OrthogonalityMonitor,
    UpdateRMSMonitor,
    GradientMonitor,
    OptimizerTimeMonitor,
    AttentionLogitMonitor,
    AutoWeightDecay,
    RunGuard,
)


def test_names_are_looked_up_once(regression: Module, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[int] = []
    walk = LightningModule.named_parameters

    class Count(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            def counted(*args: Any, **options: Any) -> Any:
                walks.append(trainer.global_step)
                return walk(pl_module, *args, **options)

            monkeypatch.setattr(pl_module, "named_parameters", counted)

    fit(regression(MuonAdamW), callbacks=[Count(), *(monitor(every_n_steps=5) for monitor in MONITORS)])
    assert set(walks) == {0}


class InSteps(Callback):
    """Two callbacks, before and behind the monitors, that tell when a step begins and ends."""

    def __init__(self, begin: Callable[[], Any] | None = None, end: Callable[[], Any] | None = None) -> None:
        self.begin = begin
        self.end = end

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.begin and trainer.global_step > 0:  # the first has histograms
            self.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.end:
            self.end()


@pytest.fixture
def fit_watched(regression: Module, fit: Fit, tensorboard: TensorBoardLogger) -> Callable[..., None]:
    """`fit_watched(every_n_steps, begin, end)`: ten steps with all monitors, or with none, told of each step."""

    def run(every_n_steps: int | None, begin: Callable[[], Any], end: Callable[[], Any], **options: Any) -> None:
        watching: list[Callback] = [monitor(every_n_steps=every_n_steps) for monitor in MONITORS if every_n_steps]
        if every_n_steps:
            watching.append(MuonDashboard(spectrum_every_n_steps=every_n_steps))
        callbacks = [InSteps(begin=begin), *watching, InSteps(end=end)]
        options["log_every_n_steps"] = every_n_steps or 11
        fit(regression(MuonAdamW), callbacks=callbacks, logger=tensorboard, **options)

    return run


def test_off_their_cadence_no_monitor_waits_for_the_device(
    fit_watched: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that brings a tensor's value to the host in a step is counted, in runs with and without monitors."""
    waits: list[str] = []
    in_step: list[bool] = [False]

    def counting(method: str) -> Callable[..., Any]:
        own = getattr(Tensor, method)

        def counted(*arguments: Any, **options: Any) -> Any:
            if in_step[0]:
                waits.append(method)
            return own(*arguments, **options)

        return counted

    for method in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "nonzero"):
        monkeypatch.setattr(Tensor, method, counting(method))

    def waits_of(every_n_steps: int | None) -> list[str]:
        waits.clear()
        fit_watched(every_n_steps, lambda: in_step.__setitem__(0, True), lambda: in_step.__setitem__(0, False))
        return waits.copy()

    assert waits_of(11) == waits_of(None)
    assert len(waits_of(10)) > len(waits_of(11))


@pytest.mark.gpu
def test_off_their_cadence_no_monitor_synchronizes(fit_watched: Callable[..., None]) -> None:
    """By CUDA's own account, which warns of each operation that makes the host wait."""

    def waits_of(every_n_steps: int | None) -> int:
        warn, default = (partial(torch.cuda.set_sync_debug_mode, mode) for mode in ("warn", "default"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit_watched(every_n_steps, warn, default, accelerator="gpu", devices=1)
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)

    assert waits_of(11) == waits_of(None)
    assert waits_of(10) > waits_of(11)
