"""Weight decay that comes when the weights need it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muon.callbacks.group_labels import labelled_groups
from lightning_muon.callbacks.monitor import StepMonitor, log_scalars, log_text, logged_step
from lightning_muon.callbacks.muon_matrices import entry_norms, is_muon, muon_groups, muon_matrices
from lightning_muon.callbacks.shards import find_shards, over_ranks, sizes

# The slope of the first few measurements is that of the warm-up; it predicts nothing.
MEASUREMENTS_TO_PREDICT = 5

# Lightning's own default, for a trainer with log_every_n_steps=0.
STEPS_WITHOUT_LOG = 50


@dataclass
class Course:
    """Where a run stands; steps are counted as they are logged.

    Args:
        active: Whether the decay is turned on.
        strength: Place on the ramp: 0 is each group's own decay, 1 is the full one.
        smoothed: Moving average of the largest RMS.
        growth: Moving average of its change, per step.
        measurements: How many there were.
        measured_at: Step of the last one.
        ramped_at: Step up to which the ramp was gone.
    """

    active: bool = False
    strength: float = 0.0
    smoothed: float = 0.0
    growth: float = 0.0
    measurements: int = 0
    measured_at: int = 0
    ramped_at: int = 0


class AutoWeightDecay(StepMonitor):
    """Turn on weight decay for Muon's groups when their weights grow too large.

    It watches the largest weight RMS among the Muon matrices of all optimizers, smoothed. When that passes ``limit``,
    or its growth says that it will within ``horizon`` steps, the weight decay of all Muon groups goes up to
    ``weight_decay`` by a linear ramp. When the RMS is back under ``release · limit``, and not about to pass the limit
    again, the decay goes down to what it was by the same ramp.

    ``weight_decay/<group>`` is logged at every measurement. Each decision is told on the console and, in TensorBoard,
    as a text. Both the state and the decision are in the checkpoint. A group has the raised decay only while its
    optimizer steps. Everyone else, a schedule or a checkpoint, sees the group's own decay and may change it.

    With Moonlight's scale an update has an RMS of 0.2, so a decay of λ holds a weight's RMS under 0.2 / λ, however the
    updates add up.

    Args:
        limit: The RMS that no matrix should pass.
        weight_decay: The decay that is turned on; a group that has more keeps its own.
        horizon: How many steps ahead the growth is extrapolated; 0 waits until the limit is passed.
        ramp_steps: Steps from no change to the full decay.
        release: Fraction of ``limit`` under which the decay is turned off again.
        smoothing: Weight of the past in the moving averages of the RMS and of its growth.
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.

    Raises:
        MisconfigurationException: If an argument is out of its range, the optimizers have no Muon group, or one without
            ``weight_decay``.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import AutoWeightDecay
        >>> trainer = Trainer(callbacks=[AutoWeightDecay(limit=0.5)])
    """

    def __init__(
        self,
        limit: float = 1.0,
        weight_decay: float = 0.5,
        horizon: int = 200,
        ramp_steps: int = 100,
        release: float = 0.8,
        smoothing: float = 0.8,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        for name, value, fits, demand in (
            ("limit", limit, limit > 0, "positive"),
            ("weight_decay", weight_decay, weight_decay > 0, "positive"),
            ("horizon", horizon, horizon >= 0, "at least 0"),
            ("ramp_steps", ramp_steps, ramp_steps >= 1, "at least 1"),
            ("release", release, 0 < release < 1, "between 0 and 1"),
            ("smoothing", smoothing, 0 <= smoothing < 1, "at least 0 and below 1"),
        ):
            if not fits:
                raise MisconfigurationException(f"AutoWeightDecay: {name} must be {demand}, got {value}")
        self.limit = limit
        self.weight_decay = weight_decay
        self.horizon = horizon
        self.ramp_steps = ramp_steps
        self.release = release
        self.smoothing = smoothing

        self._course = Course()
        self._handles: list[RemovableHandle] = []
        self._raised: list[tuple[dict[str, Any], float, float]] = []  # group, its own decay, the raised one

    @property
    def active(self) -> bool:
        """Whether the decay is turned on."""
        return self._course.active

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(limit=self.limit, weight_decay=self.weight_decay)

    @override
    def cadence(self, trainer: Trainer) -> int:
        # A trainer that logs nothing still wants its weights held.
        return super().cadence(trainer) or STEPS_WITHOUT_LOG

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # before the state in a checkpoint is restored
            self._course = Course()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            groups = muon_groups(optimizer)
            for name, group in groups:
                if "weight_decay" not in group:
                    raise MisconfigurationException(
                        f"AutoWeightDecay: {type(optimizer).__name__} has no weight_decay in its group {name!r}."
                        " Take an optimizer that decays weights, or remove the callback."
                    )
            if groups:
                self._handles.append(optimizer.register_step_pre_hook(self._raise_decay))
                self._handles.append(optimizer.register_step_post_hook(self._lower_decay))
        if not self._handles:
            raise MisconfigurationException(
                "AutoWeightDecay: no parameter group has algorithm='muon', so there is nothing to decay."
                " Make the groups with route_parameters(module), or remove the callback."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Go along the ramp by the steps that were taken."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        course, step = self._course, logged_step(trainer)
        change = (step - course.ramped_at) / self.ramp_steps
        course.strength = min(1.0, max(0.0, course.strength + (change if course.active else -change)))
        course.ramped_at = step

    @override
    @torch.no_grad()
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        matrices = muon_matrices(trainer.optimizers, self._names)
        shards = find_shards(trainer, list(matrices.values()))
        # The same on all ranks, so that all decide alike.
        found = over_ranks(trainer, shards, [entry_norms(shard.local for shard in shards), sizes(shards)])
        rms = {
            name: norm / size**0.5
            for name, norm, size in zip(matrices, found.norm[0].tolist(), found.sum[1].tolist(), strict=True)
            if size > 0
        }
        self.warn_of_not_finite(trainer, "the weight RMS", rms, so="; nothing can be said about these")
        finite = {name: value for name, value in rms.items() if math.isfinite(value)}
        if finite:
            largest = max(finite, key=finite.__getitem__)
            self._watch(finite[largest], logged_step(trainer))
            self._decide(trainer, largest, finite[largest])
        log_scalars(trainer, self._curve(trainer.optimizers))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self._course)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._course = Course(**state_dict)

    def _raise_decay(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for _, group in muon_groups(optimizer):
            own = group["weight_decay"]
            group["weight_decay"] = raised = self._on_ramp(own)
            self._raised.append((group, own, raised))

    def _lower_decay(self, *_: object) -> None:
        while self._raised:
            group, own, raised = self._raised.pop()
            if group["weight_decay"] == raised:  # else someone set it during the step
                group["weight_decay"] = own

    def _let_go(self) -> None:
        self._lower_decay()
        while self._handles:
            self._handles.pop().remove()

    def _on_ramp(self, own: float) -> float:
        return own + self._course.strength * (max(own, self.weight_decay) - own)

    def _curve(self, optimizers: list[Optimizer]) -> dict[str, float]:
        """Return the decay of each group's steps in this batch by its tag."""
        return {
            f"weight_decay/{label}": self._on_ramp(group["weight_decay"])
            for label, optimizer, _, group in labelled_groups(optimizers)
            if is_muon(optimizer, group)
        }

    def _watch(self, rms: float, step: int) -> None:
        """Take a measurement into the moving averages."""
        course = self._course
        if course.measurements == 0:
            course.smoothed = rms
        else:
            smoothed = self.smoothing * course.smoothed + (1 - self.smoothing) * rms
            slope = (smoothed - course.smoothed) / max(1, step - course.measured_at)
            first = course.measurements == 1
            course.growth = slope if first else self.smoothing * course.growth + (1 - self.smoothing) * slope
            course.smoothed = smoothed
        course.measurements += 1
        course.measured_at = step

    def _decide(self, trainer: Trainer, largest: str, now: float) -> None:
        course = self._course
        predictable = course.measurements >= MEASUREMENTS_TO_PREDICT
        expected = course.smoothed + (self.horizon * max(0.0, course.growth) if predictable else 0.0)
        state = (
            f"the weight RMS of {largest} is {now:.3g}, smoothed {course.smoothed:.3g},"
            f" and changes by {course.growth:+.2g} a step"
        )
        if not course.active and expected > self.limit:
            course.active = True
            limit = f"the limit of {self.limit:g}"
            passed = course.smoothed > self.limit
            reason = f"is over {limit}" if passed else f"will pass {limit} within {self.horizon} steps"
            self._announce(trainer, f"on: {state}; it {reason}", f"{self.weight_decay:g}")
        elif course.active and course.smoothed < self.release * self.limit and expected <= self.limit:
            course.active = False
            self._announce(trainer, f"off: {state}, safely under the limit of {self.limit:g}", "what it was")

    def _announce(self, trainer: Trainer, decision: str, goal: str) -> None:
        message = (
            f"AutoWeightDecay, step {logged_step(trainer)}: {decision}."
            f" Weight decay goes to {goal} in {self.ramp_steps} steps."
        )
        rank_zero_info(message)
        log_text(trainer, "weight_decay/decisions", message)
