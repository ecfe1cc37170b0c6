"""What TensorBoard's HPARAMS page shows of a run: its hyperparameters, and the metrics that they are judged by."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim import Optimizer

# Of each group, in this order; what an optimizer does not have is left out.
OPTIONS = ("lr", "weight_decay", "momentum", "orthogonalizer", "update_scale")

Value = str | float | int | bool


def run_hyperparameters(trainer: Trainer, initial: Mapping[str, Any]) -> dict[str, Value]:
    """Return one value a hyperparameter: of the optimizers, of the trainer, and of module and data, if they are plain.

    The learning rate is that before any schedule. Where the groups of an optimizer differ, the first has the plain name
    and another has its name added, as in ``lr (adamw)``.

    Args:
        trainer: Before its first step.
        initial: What module and data saved by ``save_hyperparameters``.
    """
    found: dict[str, Value] = {"optimizer": ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)}
    for number, optimizer in enumerate(trainer.optimizers):
        found |= _options(optimizer, f"{number}" if number else "")
    schedules = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    if schedules:
        found["lr_scheduler"] = ", ".join(schedules)
    found["max_steps"] = trainer.max_steps
    found["precision"] = str(trainer.precision)
    found["devices"] = trainer.world_size
    found["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    return found | {name: value for name, value in initial.items() if name not in found and _is_plain(value)}


def judging_metrics(trainer: Trainer) -> list[str]:
    """Return the names of the metrics that say how good a run is: what is monitored, or else its losses.

    Those come first that ``ModelCheckpoint`` and ``EarlyStopping`` look at; where they look at none that was logged,
    validation losses; and where there are none, training losses.
    """
    logged = list(trainer.callback_metrics)
    watching = [callback for callback in trainer.callbacks if isinstance(callback, (ModelCheckpoint, EarlyStopping))]
    monitored = list(dict.fromkeys(callback.monitor for callback in watching if callback.monitor in logged))
    losses = [name for name in logged if "loss" in name]
    return monitored or [name for name in losses if name.startswith("val")] or losses


def _options(optimizer: Optimizer, number: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for option in OPTIONS:
        for index, group in enumerate(optimizer.param_groups):
            value = group.get("initial_lr", group.get("lr")) if option == "lr" else group.get(option)
            if not _is_plain(value):
                continue
            name = f"{option}{number and f' of optimizer {number}'}"
            if name not in found:
                found[name] = value
            elif value != found[name] and option in {"lr", "weight_decay"}:
                found[f"{name} ({group.get('name', index)})"] = value
    return found


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, float, int, bool))
