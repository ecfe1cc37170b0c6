"""The optimizer's options, after its state was restored: as the command line says, not as they were."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_muon.cli.checkpoint_fit import check_goes_on
from lightning_muon.cli.resume import CheckpointHyperparameters, ModuleArguments, differences, plain, say

_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")

Change = tuple[Any, Any]
"""A value in the checkpoint, and the value in this run."""


class KeepCommandLineOnResume(Callback):
    """Makes the options of the optimizer follow the command line when training goes on from a checkpoint.

    A restored optimizer has the option values of the checkpoint. Options that differ now are set in the groups that
    would have them in a new run: what single groups were given survives. A new learning rate scales all learning
    rates of a group, and the base learning rates of its schedulers, by new/old: the schedule goes on at the same point
    of its curve, at the new height. A changed schedule, such as another ``T_max``, goes on where it would stand by now.
    Another class of optimizer starts afresh. What cannot follow is said, such as the seed.

    Args:
        module: The arguments of the module in this run.
        seed: The seed of this run; checkpoints hold it as ``seed_everything``.
        compared: Whether the differences between the module's arguments and the checkpoint's were already said.
    """

    def __init__(self, module: ModuleArguments, seed: int | bool | None = None, compared: bool = False) -> None:
        self.module = module
        self.seed = seed
        self.compared = compared
        self._changed: dict[str, Change] = {}
        self._rates: dict[str, Change] = {}
        self._schedule_progress: dict[str, int] | None = None  # by interval, when the old schedule does not go on
        self._fresh: list[list[dict[str, Any]]] = []

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["seed_everything"] = self.seed

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_goes_on(checkpoint, trainer)
        seed = checkpoint.get("seed_everything", self.seed)
        if seed != self.seed:
            say(
                f"seed_everything: {seed} in the checkpoint, {self.seed} used from here on; "
                "what was drawn before, such as the first weights, is the checkpoint's"
            )
        if "optimizer" not in self.module.arguments:
            return
        if not checkpoint.get("hyper_parameters"):
            say(
                "the checkpoint holds no hyperparameters (the module does not call save_hyperparameters()): "
                "the optimizer goes on with the checkpoint's options, whatever was asked for"
            )
            return
        saved = CheckpointHyperparameters.from_saved(checkpoint["hyper_parameters"])
        if not self.compared:
            saved.report(without=self.module, used=self.module)
        self._compare_scheduler(saved, checkpoint)
        self._compare_optimizer(saved, checkpoint)

    def _compare_optimizer(self, saved: ModuleArguments, checkpoint: dict[str, Any]) -> None:
        old, new = (_class_spec(module.arguments.get("optimizer")) for module in (saved, self.module))
        if old["class_path"] != new["class_path"]:
            say("model.optimizer: another optimizer than the checkpoint's: its state and its schedule start afresh")
            checkpoint["optimizer_states"] = []
            checkpoint["lr_schedulers"] = []
            return
        before, now = plain(old["init_args"]), plain(new["init_args"])
        self._rates = {option: (before.get(option), now[option]) for option in now if _is_learning_rate(option)}
        self._changed = {
            option: (before.get(option), now[option]) for option in now if before.get(option) != now[option]
        }

    def _compare_scheduler(self, saved: ModuleArguments, checkpoint: dict[str, Any]) -> None:
        old, new = (_class_spec(module.arguments.get("lr_scheduler")) for module in (saved, self.module))
        if old["class_path"] != new["class_path"]:
            changes = [f"model.lr_scheduler: {old['class_path'] or 'none'}"]
            used = [new["class_path"] or "none"]
        else:
            found = list(differences(old["init_args"], new["init_args"]))
            changes = [f"model.lr_scheduler.{key}: {before}" for key, before, _ in found]
            used = [str(now) for _, _, now in found]
        if not changes:
            return
        states = checkpoint.get("lr_schedulers", [])
        if str(new["class_path"]).endswith("ReduceLROnPlateau") and old["class_path"] == new["class_path"]:
            for change, now in zip(changes, used, strict=True):
                say(f"{change} in the checkpoint goes on, {now} is not applied: a plateau cannot be seen again")
            return
        progress = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
        self._schedule_progress = dict.fromkeys(progress, states[0]["last_epoch"]) if states else progress
        checkpoint["lr_schedulers"] = []
        for change, now in zip(changes, used, strict=True):
            say(f"{change} in the checkpoint, {now} used: the schedule goes on where the new one would be")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Now the optimizers are as the command line makes them; their state is restored between this hook and the next.
        self._fresh = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer, fresh in zip(trainer.optimizers, self._fresh, strict=True):
            self._set_options(optimizer, fresh)
            if self._schedule_progress is not None:
                _copy_learning_rates(optimizer, fresh)
                _advance_schedulers(trainer, optimizer, self._schedule_progress)
            elif any(option in self._rates for option in self._changed):
                self._scale_learning_rates(trainer, optimizer, fresh)

    def _set_options(self, optimizer: Optimizer, fresh: Sequence[Mapping[str, Any]]) -> None:
        for option in self._changed.keys() - self._rates.keys():
            new = self._changed[option][1]
            following = [
                (group, now[option])
                for group, now in zip(optimizer.param_groups, fresh, strict=True)
                # A group that was given a value of its own, such as vectors no decay, does not have the new one now.
                if option in now and _equal(now[option], new)
            ]
            for group, value in following:
                group[option] = value
            if not following:
                say(f"model.optimizer.{option}: {new} is not applied, every parameter group has a value of its own")

    def _scale_learning_rates(self, trainer: Trainer, optimizer: Optimizer, fresh: Sequence[dict[str, Any]]) -> None:
        changes = [self._change_of(group, now) for group, now in zip(optimizer.param_groups, fresh, strict=True)]
        for group, change in zip(optimizer.param_groups, changes, strict=True):
            group.update({key: _scaled(group[key], change) for key in _LEARNING_RATES if key in group})
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer:
                _scale_scheduler(config.scheduler, changes)

    def _change_of(self, group: Mapping[str, Any], fresh: Mapping[str, Any]) -> Change:
        """From which to which learning rate a group goes, as far as no schedule has moved it."""
        if "initial_lr" in group and "initial_lr" in fresh:
            return group["initial_lr"], fresh["initial_lr"]
        if group["lr"] == fresh["lr"]:
            return group["lr"], fresh["lr"]
        # Such as an optimizer's `adamw_lr`, which is `lr` for as long as it is not given.
        lr = self._rates.get("lr", (None, None))
        rates = [
            tuple(base if rate is None else rate for rate, base in zip(change, lr, strict=True))
            for change in self._rates.values()
        ]
        return next(((old, new) for old, new in rates if new == fresh["lr"]), lr)


def _class_spec(value: Any) -> dict[str, Any]:
    """A class with its arguments, however short it was written; no class for ``None``."""
    if isinstance(value, Mapping):
        return {"class_path": value.get("class_path"), "init_args": dict(value.get("init_args") or {})}
    return {"class_path": value, "init_args": {}}


def _is_learning_rate(option: str) -> bool:
    return option == "lr" or option.endswith("_lr")


def _equal(value: Any, other: Any) -> bool:
    # An option may be stored as {} where None was given.
    return bool(plain(value) == other) or (not value and not other)


def _scaled(rate: Any, change: Change) -> Any:
    old, new = change
    if not old or new is None or old == new:
        return rate
    # Not by a product where it can be exact.
    return new if rate == old else rate * (new / old)


def _scale_scheduler(scheduler: Any, changes: Sequence[Change]) -> None:
    for nested in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(nested, changes)
    for name in ("base_lrs", "_last_lr"):
        if hasattr(scheduler, name):
            rates = [_scaled(rate, change) for rate, change in zip(getattr(scheduler, name), changes, strict=True)]
            setattr(scheduler, name, rates)


def _advance_schedulers(trainer: Trainer, optimizer: Optimizer, progress: Mapping[str, int]) -> None:
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer and not isinstance(config.scheduler, ReduceLROnPlateau):
            with warnings.catch_warnings():
                # torch warns of the order of steps, and of learning rates past the end of a schedule.
                warnings.simplefilter("ignore")
                for _ in range(progress[config.interval] // config.frequency):
                    config.scheduler.step()


def _copy_learning_rates(optimizer: Optimizer, fresh: Sequence[Mapping[str, Any]]) -> None:
    for group, now in zip(optimizer.param_groups, fresh, strict=True):
        for key in _LEARNING_RATES:
            group.pop(key, None)
            if key in now:
                group[key] = now[key]
