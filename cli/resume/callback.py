"""Carry out the plan of a resumed run: the restored optimizer gets the options of the command line."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_muon.cli.output import say
from lightning_muon.cli.resume.checks import check_progress
from lightning_muon.cli.resume.plan import Change, ResumePlan, SavedRun, differences, plain
from lightning_muon.cli.secrets import Secrets
from lightning_muon.optim import MuonAdamW
from lightning_muon.optim.saved_groups import complete_names, regrouped

_LENGTH = ".total_steps"
_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")

Group = dict[str, Any]


class KeepCommandLineOnResume(Callback):
    """Make the options of the optimizer follow the command line when training goes on from a checkpoint.

    A restored optimizer has the option values of the checkpoint. Those that differ in this run are set in each group
    that has the new value in a new run; values that single groups were given stay. A new learning rate scales all
    learning rates of a group, and the base rates of its schedulers, by new/old: the schedule goes on at the same point
    of its curve, at the new height. A changed schedule, such as another ``T_max``, starts at the point it would have
    reached by now. Another class of optimizer starts afresh. What cannot be changed, such as the seed, is printed.

    Args:
        plan: The plan of this run. If only the trainer finds the checkpoint, it is added to the plan when it is loaded.
        secrets: Which hyperparameters come from the environment: texts are saved as they were written.
    """

    def __init__(self, plan: ResumePlan, secrets: Secrets | None = None) -> None:
        self.plan = plan
        self.secrets = Secrets() if secrets is None else secrets
        self._changed: dict[str, Change] = {}
        self._rates: dict[str, Change] = {}
        self._schedule_progress: dict[str, int] | None = None  # by interval; None while the old schedule goes on
        self._fresh: list[list[Group]] = []
        self._checkpoint: dict[str, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Each rank looks for `last` by itself; on a network file system some may not see the newest yet.
        first = trainer.strategy.broadcast(str(self.plan.path))
        if first != str(self.plan.path):
            raise ValueError(
                f"--ckpt_path: rank 0 goes on from '{first}', rank {trainer.global_rank} from '{self.plan.path}'"
            )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["seed_everything"] = self.plan.seed
        for key, prefix in (("hyper_parameters", "model"), ("datamodule_hyper_parameters", "data")):
            if key in checkpoint:
                checkpoint[key] = self.secrets.masked(checkpoint[key], prefix, only_texts=True)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._checkpoint = checkpoint
        _load_data_again(trainer)
        plan = self.plan
        found_by_the_trainer = plan.saved is None
        if plan.saved is None:
            plan.saved = SavedRun.of(checkpoint)
            check_progress(plan.saved, trainer)
        seed = checkpoint.get("seed_everything", plan.seed)
        if seed != plan.seed:
            say(
                f"seed_everything: {seed} in the checkpoint, {plan.seed} used from here on; "
                "what was drawn before, such as the first weights, is the checkpoint's"
            )
        if "optimizer" not in plan.used.arguments:
            return
        if plan.saved_module is None:
            say(
                "the checkpoint holds no hyperparameters (the module does not call save_hyperparameters()): "
                "the optimizer goes on with the checkpoint's options, whatever was asked for"
            )
            return
        if found_by_the_trainer:
            plan.print_differences()
        self._plan_schedule(checkpoint)
        self._plan_options(checkpoint)
        self._plan_length(trainer)  # of strategies that shard, which have made the schedules already

    def _plan_schedule(self, checkpoint: dict[str, Any]) -> None:
        old, new = self.plan.class_specs("lr_scheduler")
        if old["class_path"] != new["class_path"]:
            changes = {"": Change(old["class_path"] or "none", new["class_path"] or "none")}
        else:
            changes = {f".{key}": change for key, change in differences(old["init_args"], new["init_args"])}
            if None in changes.get(_LENGTH, ()):
                del changes[_LENGTH]  # it is the length of the run, which _plan_length compares
        if not changes:
            return
        plateau = old["class_path"] == new["class_path"] and str(new["class_path"]).endswith("ReduceLROnPlateau")
        for key, (before, now) in changes.items():
            what = f"model.lr_scheduler{key}: {before} in the checkpoint"
            if plateau:
                say(f"{what} goes on, {now} is not applied: the history of ReduceLROnPlateau cannot be replayed")
            else:
                say(f"{what}, {now} used: the schedule goes on where the new one would be")
        if not plateau:
            self._let_schedule_begin_again(checkpoint)

    def _plan_length(self, trainer: Trainer) -> None:
        """Plan for schedules of the run's length, where that is another one; they are known only once they are made."""
        states = self._checkpoint.get("lr_schedulers", [])
        for config, state in zip(trainer.lr_scheduler_configs, states, strict=False):
            options = self.plan.class_specs("lr_scheduler").old["init_args"]
            before = state.get("total_steps", options.get("total_steps"))
            now = getattr(config.scheduler, "total_steps", None)
            if before is not None and now is not None and before != now:
                say(
                    f"model.lr_scheduler{_LENGTH}: {before} in the checkpoint, {now} used: the schedule goes on where"
                    " the new one would be"
                )
                self._let_schedule_begin_again(self._checkpoint)
                return

    def _let_schedule_begin_again(self, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("lr_schedulers", [])
        progress = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
        self._schedule_progress = dict.fromkeys(progress, states[0]["last_epoch"]) if states else progress
        checkpoint["lr_schedulers"] = []

    def _plan_options(self, checkpoint: dict[str, Any]) -> None:
        old, new = self.plan.class_specs("optimizer")
        if old["class_path"] != new["class_path"]:
            say("model.optimizer: another optimizer than the checkpoint's: its state and its schedule start afresh")
            checkpoint["optimizer_states"] = []
            checkpoint["lr_schedulers"] = []
            return
        runs = old["init_args"], new["init_args"]  # options that are null in this run are left out
        options = {key: Change(*(run.get(key) for run in runs)) for key in dict.fromkeys(chain(*reversed(runs)))}
        modules = (self.plan.saved_module, self.plan.used)
        by_role = [(module and module.arguments.get("lr_by_role")) or {} for module in modules]
        roles = dict.fromkeys(chain(*by_role))
        options |= {_rate_of(role): Change(*(rates.get(role) for rates in by_role)) for role in roles}
        rates = ("lr", *map(_rate_of, roles))
        self._rates = {key: change for key, change in options.items() if key in rates or key.endswith("_lr")}
        self._changed = {key: change for key, change in options.items() if change.old != change.new}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The optimizers are new here; their state is restored between this hook and on_train_start.
        self._fresh = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        # Strategies that shard restore it themselves, and have not called on_load_checkpoint yet.
        if self._checkpoint:
            _load_data_again(trainer)
            self._plan_length(trainer)
        states = self._checkpoint.get("optimizer_states", [])
        states[:] = [*map(_regrouped, trainer.optimizers, states), *states[len(trainer.optimizers) :]]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._checkpoint and trainer.lr_scheduler_configs:
            from lightning_muon.strategies import follow_groups  # noqa: PLC0415 - only resumed runs need it

            for config in trainer.lr_scheduler_configs:
                follow_groups(config.scheduler, config.scheduler.optimizer.param_groups)
        self._checkpoint = {}
        for optimizer, fresh in zip(trainer.optimizers, self._fresh, strict=True):
            # Groups that a callback such as BackboneFinetuning has added meanwhile keep what they had.
            fresh.extend(map(dict, optimizer.param_groups[len(fresh) :]))
            self._set_options(optimizer, fresh)
            if self._schedule_progress is not None:
                _copy_learning_rates(optimizer, fresh)
                _advance_schedulers(trainer, optimizer, self._schedule_progress)
            elif any(option in self._rates for option in self._changed):
                self._scale_learning_rates(trainer, optimizer, fresh)

    def _set_options(self, optimizer: Optimizer, fresh: Sequence[Group]) -> None:
        for option in self._changed.keys() - self._rates.keys():
            new = self._changed[option].new
            following = [
                (group, now[option])
                for group, now in zip(optimizer.param_groups, fresh, strict=True)
                # A group with a value of its own, such as no decay for vectors, does not have the new one here.
                if option in now and _equal(now[option], new)
            ]
            for group, value in following:
                group[option] = value
            if not following:
                say(f"model.optimizer.{option}: {new} is not applied, every parameter group has a value of its own")

    def _scale_learning_rates(self, trainer: Trainer, optimizer: Optimizer, fresh: Sequence[Group]) -> None:
        changes = [self._rate_change(group, now) for group, now in zip(optimizer.param_groups, fresh, strict=True)]
        for group, change in zip(optimizer.param_groups, changes, strict=True):
            group.update({key: _scaled(group[key], change) for key in _LEARNING_RATES if key in group})
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer:
                _scale_scheduler(config.scheduler, changes)

    def _rate_change(self, group: Group, fresh: Group) -> Change:
        """Return the old and the new learning rate of a group, without what a schedule did to them."""
        if "initial_lr" in group and "initial_lr" in fresh:
            return Change(group["initial_lr"], fresh["initial_lr"])
        if group["lr"] == fresh["lr"]:
            return Change(group["lr"], fresh["lr"])
        # An option such as `adamw_lr` defaults to `lr` on either side, and the rate of a role to `adamw_lr`.
        lr = self._rates.get("lr", Change(None, None))
        adamw = self._rates.get("adamw_lr", lr) if fresh.get("algorithm") == "adamw" else lr
        role = self._rates.get(_rate_of(fresh.get("role")))
        rates = [
            Change(*(next((rate for rate in of_run if rate is not None), None) for of_run in zip(*rates, strict=True)))
            for rates in ([role, adamw, lr] if role else [adamw, lr], *([rate, lr] for rate in self._rates.values()))
        ]
        return next((change for change in rates if change.new == fresh["lr"]), lr)


def _load_data_again(trainer: Trainer) -> None:
    """Let Lightning load the training data as it begins to train, with the place in the epoch.

    If a schedule has asked for the length of the run, they are loaded already, and Lightning would keep them.
    """
    trainer.fit_loop._combined_loader = None


def _rate_of(role: Any) -> str:
    return f"lr_by_role.{role}"


def _regrouped(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer of torch in its groups, which torch matches by position, and MuonAdamW by name.

    State of parameters with other names, or without names, is returned as it is.
    """
    own, saved = complete_names(optimizer.param_groups), complete_names(state["param_groups"])
    if isinstance(optimizer, MuonAdamW) or own is None or saved is None or own == saved:
        return state
    same = sorted(chain.from_iterable(own)) == sorted(chain.from_iterable(saved))
    return regrouped(optimizer.param_groups, state, saved) if same else state


def _equal(value: Any, other: Any) -> bool:
    # An option may be stored as {} where None was given.
    return bool(plain(value) == other) or (not value and not other)


def _scaled(rate: Any, change: Change) -> Any:
    old, new = change
    if not old or new is None or old == new:
        return rate
    return new if rate == old else rate * (new / old)  # exact where nothing has moved the rate


def _scale_scheduler(scheduler: Any, changes: Sequence[Change]) -> None:
    for nested in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(nested, changes)
    for name in ("base_lrs", "_last_lr"):
        if hasattr(scheduler, name):
            # A scheduler has no rates of groups that were added after it was made.
            rates = [_scaled(rate, change) for rate, change in zip(getattr(scheduler, name), changes, strict=False)]
            setattr(scheduler, name, rates)


def _advance_schedulers(trainer: Trainer, optimizer: Optimizer, progress: Mapping[str, int]) -> None:
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is optimizer and not isinstance(config.scheduler, ReduceLROnPlateau):
            with warnings.catch_warnings():
                # torch warns about the order of steps, and about learning rates past the end of a schedule.
                warnings.simplefilter("ignore")
                for _ in range(progress[config.interval] // config.frequency):
                    config.scheduler.step()


def _copy_learning_rates(optimizer: Optimizer, fresh: Sequence[Group]) -> None:
    for group, now in zip(optimizer.param_groups, fresh, strict=True):
        for key in _LEARNING_RATES:
            group.pop(key, None)
            if key in now:
                group[key] = now[key]
