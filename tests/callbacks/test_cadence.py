"""Between the steps in which they measure, monitors look at nothing and wait for nothing."""

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_muon.callbacks import (
    AutoWeightDecay,
    GradientMonitor,
    MuonDashboard,
    OptimizerTimeMonitor,
    OrthogonalityMonitor,
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
    AutoWeightDecay,
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


def test_off_their_cadence_no_monitor_waits_for_the_device(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that brings a tensor's value to the host in a step is counted, in runs with and without monitors."""
    waits: list[str] = []
    in_step: list[bool] = [False]

    class Begin(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            in_step[0] = trainer.global_step > 0  # the first has histograms

    class End(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            in_step[0] = False

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
        watching: list[Callback] = [monitor(every_n_steps=every_n_steps) for monitor in MONITORS if every_n_steps]
        if every_n_steps:
            watching.append(MuonDashboard(spectrum_every_n_steps=every_n_steps))
        callbacks = [Begin(), *watching, End()]
        fit(regression(MuonAdamW), callbacks=callbacks, logger=tensorboard, log_every_n_steps=every_n_steps or 11)
        return waits.copy()

    assert waits_of(11) == waits_of(None)
    assert len(waits_of(10)) > len(waits_of(11))  # the run has ten steps
