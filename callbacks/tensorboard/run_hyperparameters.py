"""The entry of a run on TensorBoard's HParams page: its hyperparameters, and the metrics that judge them."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import hparams
from typing_extensions import TypeIs

from lightning_muon.callbacks.auto_weight_decay import AutoWeightDecay
from lightning_muon.callbacks.hyperparameter_schedule import HyperparameterSchedule

# Of each parameter group, in this order, if the optimizer has them.
OPTIONS = ("lr", "weight_decay", "momentum", "orthogonalizer", "update_scale")

# The page shows five columns by default, those that differ between runs first.
FIRST_COLUMNS = {"lr", "optimizer", "precision", "target_rms", "weight_decay"}

Value = str | float | int | bool


def run_hyperparameters(trainer: Trainer, initial: Mapping[str, Any]) -> dict[str, Value]:
    """Return the plain hyperparameters of optimizers, trainer, callbacks that set them, module and data.

    The learning rate is the one before any schedule. If the groups of an optimizer differ, the value of the first has
    the plain name, and those of the others have the group's name added, as in ``lr (head)``.

    Args:
        trainer: Before its first step.
        initial: The hyperparameters that module and data saved by ``save_hyperparameters``.
    """
    found: dict[str, Value] = {"optimizer": ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)}
    for number, optimizer in enumerate(trainer.optimizers):
        found |= _options(optimizer, f" of optimizer {number}" if number else "")
    if schedules := [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]:
        found["lr_scheduler"] = ", ".join(schedules)
    found["max_steps"] = trainer.max_steps
    found["precision"] = str(trainer.precision)
    found["devices"] = trainer.world_size
    found["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AutoWeightDecay) and callback.target_rms is not None:
            found["target_rms"] = callback.target_rms
        if isinstance(callback, HyperparameterSchedule):
            name, _, points = str(callback).partition(": ")
            found[f"schedule of {name}"] = points
    known = {*found, "_instantiator", "_class_path"}  # LightningCLI adds the last two
    return found | {name: value for name, value in initial.items() if name not in known and _is_plain(value)}


def judging_metrics(trainer: Trainer) -> list[str]:
    """Return the names of the metrics that say how good a run is.

    These are the metrics that ``ModelCheckpoint`` and ``EarlyStopping`` monitor. If none of them was logged, the
    validation losses; if there is none either, the training losses.
    """
    logged = list(trainer.callback_metrics)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    watching = [callback.monitor for callback in callbacks if isinstance(callback, (ModelCheckpoint, EarlyStopping))]
    monitored = [monitor for monitor in dict.fromkeys(watching) if monitor in logged]
    losses = [name for name in logged if "loss" in name]
    return monitored or [name for name in losses if name.startswith("val")] or losses


def page_entry(hyperparameters: Mapping[str, Value], metrics: Iterable[str]) -> tuple[Summary, Summary, Summary]:
    """Return the summaries for TensorBoard's page: its columns, the values at a run's start, and the mark of its end.

    Args:
        hyperparameters: Of the run.
        metrics: Names of the metrics. The page shows the last logged value of each.
    """
    columns, start, end = hparams(dict(hyperparameters), dict.fromkeys(metrics, 0.0))
    plugin_data = columns.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for column in content.experiment.hparam_infos:
        column.differs = column.name in FIRST_COLUMNS
    plugin_data.content = content.SerializeToString()
    return columns, start, end


def _options(optimizer: Optimizer, suffix: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for option in OPTIONS:
        for index, group in enumerate(optimizer.param_groups):
            value = group.get("initial_lr", group.get("lr")) if option == "lr" else group.get(option)
            if not _is_plain(value):
                continue
            name = f"{option}{suffix}"
            if name not in found:
                found[name] = value
            elif value != found[name] and option in {"lr", "weight_decay"}:
                found[f"{name} ({group.get('name', index)})"] = value
    return found


def _is_plain(value: object) -> TypeIs[Value]:
    return isinstance(value, (str, float, int, bool))
