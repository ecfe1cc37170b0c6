"""A schedule for any hyperparameter of the optimizer's groups but the learning rate."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muon.callbacks.arguments import NameChoice, is_number, some
from lightning_muon.callbacks.auto_weight_decay import AutoWeightDecay
from lightning_muon.callbacks.logging import log_message, log_scalars, logged_step
from lightning_muon.callbacks.matrices import LabelledGroup, labelled_groups
from lightning_muon.callbacks.points import PiecewiseLinear, Points
from lightning_muon.optim.update.options import AdamWOptions, MuonOptions

# Entries of `betas`, by the names under which they are scheduled.
BETAS = {"beta1": 0, "beta2": 1}

# Decays of moving averages; other hyperparameters may be any finite number from 0 on.
BELOW_ONE = {"momentum", "neuron_beta", *BETAS}

# What learning-rate schedulers set, or write into the groups for themselves.
OF_SCHEDULERS = {"lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"}

# Options by algorithm, for an optimizer whose groups have those of both.
OPTIONS = {"muon": MuonOptions.__required_keys__, "adamw": AdamWOptions.__required_keys__}


class HyperparameterSchedule(Callback):
    """Set a hyperparameter of the optimizer's groups by a piecewise linear function of the optimizer step.

    Every number in the groups of any optimizer can be scheduled, such as ``momentum``, ``weight_decay``, ``eps``,
    ``neuron_beta``, and the entries of ``betas`` as ``beta1`` and ``beta2``; but not the learning rate, which has its
    own schedulers. Several schedules may work side by side if each sets another hyperparameter, or other groups.

    The value depends on ``trainer.global_step`` alone, so a resumed run continues exactly. Steps are counted as
    ``trainer.max_steps`` counts them: under manual optimization those of all optimizers together, which must be stepped
    through Lightning. As with a learning-rate schedule, a checkpoint contains the value of the next step; a run that is
    resumed from it without this callback keeps that value.

    - ``hyperparameter/<hyperparameter>/<group>``: the value for the step, in logged steps.
    - ``hyperparameter/<hyperparameter>``: the groups, and the points by steps, as a text.

    Args:
        hyperparameter: Its name in the groups.
        points: Values by their places in the run, in the order of the run. A place is a step from 0 on, a step counted
            from the end (-1 is the last), or a part of the run: ``"0%"`` is the first step, ``"100%"`` the last. The
            value is linear between the points, and constant before the first and after the last.
        groups: Shell patterns for names or algorithms of groups. Default: all groups in which the hyperparameter has an
            effect. A ``weight_decay`` of 0 is meant to stay: by default such groups are left out.

    Raises:
        MisconfigurationException: If an argument is wrong; at the start of training, if no group has the
            hyperparameter, a pattern matches none that has it, or something else sets it: another schedule, a scheduler
            that cycles the momentum, ``AutoWeightDecay`` with a target. Also if the places do not increase, are outside
            of the run, or depend on its length and that is not known.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import HyperparameterSchedule
        >>> momentum = HyperparameterSchedule("momentum", {0: 0.85, 300: 0.95, -50: 0.95, -1: 0.85})
        >>> weight_decay = HyperparameterSchedule("weight_decay", {"80%": 0.1, "100%": 0.0})
        >>> trainer = Trainer(max_steps=1000, callbacks=[momentum, weight_decay])
    """

    def __init__(
        self, hyperparameter: str, points: Mapping[int | str, float], groups: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if hyperparameter in OF_SCHEDULERS:
            raise MisconfigurationException(
                f"HyperparameterSchedule: hyperparameter is {hyperparameter!r}, which learning-rate schedulers set."
                " Return one from configure_optimizers, or set lr_scheduler in the config."
            )
        if groups is not None and not (
            isinstance(groups, (list, tuple)) and groups and all(isinstance(pattern, str) for pattern in groups)
        ):
            raise MisconfigurationException(
                "HyperparameterSchedule: groups must be a list of patterns for names of groups, or null for all, got"
                f" {groups!r}"
            )
        self.hyperparameter = hyperparameter
        self.points = points
        self.groups = groups
        below = 1.0 if hyperparameter in BELOW_ONE else math.inf
        self._points = Points("HyperparameterSchedule: points", points, below)
        self._choice = NameChoice("HyperparameterSchedule: groups", True if groups is None else groups)
        self._value_at = PiecewiseLinear([(0, self._points.at_the_start)])
        self._chosen: list[LabelledGroup] = []
        self._seen: set[tuple[Optimizer, int]] = set()  # places of groups that were chosen or left out
        self._count = 0  # of all groups
        self._step = 0  # of the value that was set last
        self._value = self._points.at_the_start
        self._logged: int | None = None
        self._handles: list[RemovableHandle] = []

    def __str__(self) -> str:
        of = f" of {', '.join(self.groups)}" if self.groups else ""
        return f"{self.hyperparameter}{of}: {self._points}"

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The optimizers are new here, with the values of the user. They are restored before on_train_start.
        self._chosen, self._seen = [], set()
        groups = labelled_groups(trainer.optimizers)
        self._check_hyperparameter(groups)
        self._choice.check(
            dict.fromkeys(name for labelled in groups if self._acts_in(labelled) for name in _names(labelled))
        )
        self._choose(trainer)
        if not self._chosen:
            raise MisconfigurationException(
                "HyperparameterSchedule: weight_decay is 0 in all groups, and by default such groups are left out:"
                f" name in groups which are to decay. There are {some([labelled.label for labelled in groups])}."
            )
        self._refuse_conflicts(trainer)
        self._value_at = PiecewiseLinear([(0, self._points.at_the_start)])
        self._set(trainer)
        # Before AutoWeightDecay attaches its own: it sets another decay for the time of a step.
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(partial(self._before_step, trainer)))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._value_at = self._points.in_a_run(steps_of_run(trainer))
        self._set(trainer)
        self._logged = None
        labels = ", ".join(labelled.label for labelled in self._chosen)
        points = ", ".join(f"{value:g} in step {step:g}" for step, value in self._value_at.points)
        log_message(trainer, f"hyperparameter/{self.hyperparameter}", f"{self.hyperparameter} of {labels}: {points}")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._set(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer._logger_connector.should_update_logs and logged_step(trainer) != self._logged:
            self._logged = logged_step(trainer)
            quantity = f"hyperparameter/{self.hyperparameter}"
            log_scalars(trainer, {f"{quantity}/{labelled.label}": self._value for labelled in self._chosen})

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        # The value of the next step: callbacks such as LearningRateMonitor look before this one's on_train_batch_start.
        self._set(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _before_step(self, trainer: Trainer, *_: object) -> None:
        # Under manual optimization a batch may have several steps. The step of a subclass may call that of its parent,
        # which runs the hooks again.
        if trainer.global_step != self._step:
            self._set(trainer)

    def _close(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._chosen, self._seen = [], set()

    def _set(self, trainer: Trainer) -> None:
        if sum(len(optimizer.param_groups) for optimizer in trainer.optimizers) != self._count:
            self._choose(trainer)  # some groups were added later
        self._step = trainer.global_step
        self._value = self._value_at(self._step)
        for labelled in self._chosen:
            group = _current(labelled)
            if self.hyperparameter in BETAS:
                betas = list(group["betas"])
                betas[BETAS[self.hyperparameter]] = self._value
                group["betas"] = tuple(betas)
            else:
                group[self.hyperparameter] = self._value

    def _choose(self, trainer: Trainer) -> None:
        """Add the groups that are new here and that this schedule is to set."""
        self._count = sum(len(optimizer.param_groups) for optimizer in trainer.optimizers)
        for labelled in labelled_groups(trainer.optimizers):
            if _place(labelled) in self._seen or not self._acts_in(labelled):
                continue
            self._seen.add(_place(labelled))
            has_no_decay = self.hyperparameter == "weight_decay" and _current(labelled)["weight_decay"] == 0
            if any(map(self._choice.takes, _names(labelled))) and not (has_no_decay and self.groups is None):
                self._chosen.append(labelled)

    def _acts_in(self, labelled: LabelledGroup) -> bool:
        return self.hyperparameter in _hyperparameters(labelled)

    def _check_hyperparameter(self, groups: Sequence[LabelledGroup]) -> None:
        """Raise a MisconfigurationException if the hyperparameter is not a number in any group."""
        if any(map(self._acts_in, groups)):
            return
        off = [labelled.label for labelled in groups if _options(labelled).get(self.hyperparameter, 0) is None]
        if off:
            raise MisconfigurationException(
                f"HyperparameterSchedule: {self.hyperparameter} is turned off (null) in {some(off)}: give the optimizer"
                " a value of it first"
            )
        known = dict.fromkeys(name for labelled in groups for name in _hyperparameters(labelled))
        raise MisconfigurationException(
            f"HyperparameterSchedule: no parameter group has a hyperparameter {self.hyperparameter!r} that is a number;"
            f" there are {', '.join(known) or 'none'}"
        )

    def _refuse_conflicts(self, trainer: Trainer) -> None:
        """Raise a MisconfigurationException if something else sets the hyperparameter of the same groups."""
        name = self.hyperparameter
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, HyperparameterSchedule) and callback is not self:
                others = {_place(labelled) for labelled in callback._chosen if callback.hyperparameter == name}
                if twice := [labelled.label for labelled in self._chosen if _place(labelled) in others]:
                    raise MisconfigurationException(
                        f"HyperparameterSchedule: two schedules set {name} of {some(twice)}: give them different groups"
                    )
            if isinstance(callback, AutoWeightDecay) and callback.target_rms is not None:
                muon = [labelled.label for labelled in self._chosen if labelled.is_muon and name == "weight_decay"]
                if muon:
                    raise MisconfigurationException(
                        f"HyperparameterSchedule: AutoWeightDecay(target_rms={callback.target_rms!r}) computes the"
                        f" weight_decay of {some(muon)}. Remove one of the two, or schedule other groups."
                    )
        optimizers = {labelled.optimizer for labelled in self._chosen}
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if name in {"momentum", "beta1"} and scheduler.optimizer in optimizers and _cycles_momentum(scheduler):
                raise MisconfigurationException(
                    f"HyperparameterSchedule: {type(scheduler).__name__} cycles {name} too. Give it"
                    " cycle_momentum=False, or remove the schedule."
                )


def _current(labelled: LabelledGroup) -> dict[str, Any]:
    """Return the group itself, which is another one after a state dict was loaded."""
    group: dict[str, Any] = labelled.optimizer.param_groups[labelled.place]
    return group


def _place(labelled: LabelledGroup) -> tuple[Optimizer, int]:
    return labelled.optimizer, labelled.place


def _names(labelled: LabelledGroup) -> list[str]:
    """Return the names by which a group can be chosen: its own, and that of its algorithm."""
    algorithm = labelled.group.get("algorithm")
    return [labelled.label] if algorithm is None else [labelled.label, algorithm]


def _options(labelled: LabelledGroup) -> dict[str, Any]:
    """Return the options of a group that have an effect in it, but for those of learning-rate schedulers."""
    group = _current(labelled)
    dead = set(OF_SCHEDULERS)
    if {"momentum", "betas"} <= group.keys() and group.get("algorithm") in OPTIONS:  # it has those of both algorithms
        dead |= frozenset().union(*OPTIONS.values()) - OPTIONS[group["algorithm"]]
    options = {key: value for key, value in group.items() if key not in dead}
    if "betas" in options:
        options |= {name: options["betas"][index] for name, index in BETAS.items()}
    return options


def _hyperparameters(labelled: LabelledGroup) -> dict[str, float]:
    """Return the :func:`_options` that are numbers."""
    return {key: value for key, value in _options(labelled).items() if is_number(value)}


def _cycles_momentum(scheduler: Any) -> bool:
    """Return whether a scheduler, or one inside it, sets the momentum."""
    nested = getattr(scheduler, "_schedulers", ())
    return bool(getattr(scheduler, "cycle_momentum", False)) or any(map(_cycles_momentum, nested))


def steps_of_run(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps of the run, in all its parts; ``None`` if it is not known."""
    # Under manual optimization Lightning knows the number of batches, but not how many steps these have.
    steps = trainer.estimated_stepping_batches if trainer.lightning_module.automatic_optimization else trainer.max_steps
    return int(steps) if 0 < steps < math.inf else None  # -1: an iterable dataset without a length
