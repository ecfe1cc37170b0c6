"""What TensorBoard's HParams page shows of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams import metadata

from lightning_muon.callbacks import AutoWeightDecay, HyperparameterSchedule, MuonDashboard, WeightRMSMonitor
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]


def shown(found: Any) -> tuple[dict[str, Any], list[str]]:
    """The hyperparameters and the names of the metrics on TensorBoard's page, of a run that has ended."""
    start = metadata.parse_session_start_info_plugin_data(found.plugin_data(metadata.SESSION_START_INFO_TAG))
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    columns = metadata.parse_experiment_plugin_data(found.plugin_data(metadata.EXPERIMENT_TAG))
    assert metadata.parse_session_end_info_plugin_data(found.plugin_data(metadata.SESSION_END_INFO_TAG))
    return values, [metric.name.tag for metric in columns.metric_infos]


def test_hyperparameters_stand_beside_the_final_metric(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, tmp_path: Path
) -> None:
    class Scheduled(regression):  # type: ignore[valid-type,misc]
        def __init__(self, width: int = 3) -> None:
            super().__init__(partial(MuonAdamW, lr=0.02, adamw_lr=0.5, weight_decay=0.25))
            self.save_hyperparameters()

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]

    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss")
    trainer = fit(
        Scheduled(),
        callbacks=[checkpoint, WeightRMSMonitor(), MuonDashboard()],
        logger=tensorboard,
        limit_val_batches=2,
        max_epochs=2,
        enable_checkpointing=True,
    )
    values, metrics = shown(events(trainer))
    assert values["optimizer"] == "MuonAdamW"
    assert values["lr"] == 0.02
    assert values["lr (head)"] == 0.5
    assert values["weight_decay"] == 0.25
    assert values["weight_decay (vector)"] == 0.0
    assert values["lr_scheduler"] == "ExponentialLR"
    assert values["width"] == 3
    assert metrics == ["val/loss"]
    scalars = events(trainer).scalars()
    assert scalars["val/loss"][-1][1] == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    assert "hp_metric" not in scalars


def test_without_a_monitored_metric_the_losses_judge(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[MuonDashboard()], logger=tensorboard)
    assert shown(events(trainer))[1] == ["train/loss"]


def test_schedules_are_hyperparameters(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    schedules = [
        HyperparameterSchedule("momentum", {0: 0.9, "100%": 0.95}),
        HyperparameterSchedule("weight_decay", {-1: 0.5}, groups=["muon", "adamw"]),
    ]
    trainer = fit(regression(MuonAdamW), callbacks=[MuonDashboard(), *schedules], logger=tensorboard)
    values = shown(events(trainer))[0]
    assert values["schedule of momentum"] == "0: 0.9, 100%: 0.95"
    assert values["schedule of weight_decay of muon, adamw"] == "-1: 0.5"
    assert values["momentum"] == 0.9


@pytest.mark.parametrize("target", [0.2, "bf16", None])
def test_a_target_of_the_weights_is_a_hyperparameter(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, target: Any
) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[AutoWeightDecay(target), MuonDashboard()], logger=tensorboard)
    assert shown(events(trainer))[0].get("target_rms") == target


def test_lightnings_own_hp_metric_gets_the_final_value(
    regression: Module, fit: Fit, events: Any, tmp_path: Path
) -> None:
    class Configured(regression):  # type: ignore[valid-type,misc]
        def __init__(self, width: int = 3) -> None:
            super().__init__(MuonAdamW)
            self.save_hyperparameters()

    logger = TensorBoardLogger(tmp_path / "default", default_hp_metric=True)
    trainer = fit(Configured(), callbacks=[MuonDashboard()], logger=logger, limit_val_batches=2)
    logged = [value for _, value in events(trainer).scalars()["hp_metric"]]
    assert logged == [-1.0, pytest.approx(float(trainer.callback_metrics["val/loss"]))]
