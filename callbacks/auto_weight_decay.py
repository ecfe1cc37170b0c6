"""Weight decay that comes when the weights need it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.monitor import StepMonitor, log_scalars, log_text
from lightning_muon.callbacks.muon_matrices import muon_groups, muon_matrices, root_mean_square

# The slope of the first few measurements is that of the warm-up; it predicts nothing.
MEASUREMENTS_TO_PREDICT = 5


class AutoWeightDecay(StepMonitor):
    """Turn on weight decay for Muon's groups when their weights grow too large.

    It watches the largest weight RMS among Muon's matrices, smoothed. When that passes ``limit``, or its growth says
    that it will within ``horizon`` steps, the weight decay of all Muon groups goes up to ``weight_decay`` by a linear
    ramp. When the RMS is back under ``release · limit``, and not about to pass the limit again, the decay goes down to
    what it was by the same ramp.

    ``weight_decay/<group>`` is logged at every measurement. Each decision is told on the console and, in TensorBoard,
    as a text. Both the state and the decision are in the checkpoint. If something else changes a group's weight decay,
    such as the command line of a resumed run, the new value is what the callback starts from and returns to.

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
        MisconfigurationException: If an argument is out of its range, or the optimizers have no Muon group.

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

        self.active = False
        self._strength = 0.0  # of the ramp: 0 is each group's own decay, 1 is ``weight_decay``
        self._smoothed = 0.0
        self._growth = 0.0  # of the smoothed RMS, per step
        self._measurements = 0
        self._measured_at = 0
        self._ramped_at = 0
        self._own_decay: dict[str, float] = {}
        self._set_decay: dict[str, float] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(limit=self.limit, weight_decay=self.weight_decay)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(muon_groups(optimizer, pl_module) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "AutoWeightDecay: no parameter group has algorithm='muon', so there is nothing to decay."
                " Make the groups with route_parameters(module), or remove the callback."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Go one step along the ramp."""
        steps, self._ramped_at = trainer.global_step - self._ramped_at, trainer.global_step
        direction = 1 if self.active else -1
        self._strength = min(1.0, max(0.0, self._strength + direction * steps / self.ramp_steps))
        for optimizer in trainer.optimizers:
            for group in muon_groups(optimizer, pl_module):
                decay = group.options["weight_decay"]
                if decay != self._set_decay.get(group.name):
                    self._own_decay[group.name] = decay
                own = self._own_decay[group.name]
                decay = own + self._strength * (max(own, self.weight_decay) - own)
                group.options["weight_decay"] = self._set_decay[group.name] = decay

    @override
    @torch.no_grad()
    def after_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        matrices = muon_matrices(optimizer, pl_module)
        if not matrices:
            return
        rms = dict(zip(matrices, root_mean_square(matrices).tolist(), strict=True))
        largest = max(rms, key=rms.__getitem__)
        self._watch(rms[largest], trainer.global_step)
        self._decide(trainer, largest)
        groups = muon_groups(optimizer, pl_module)
        log_scalars(trainer, {f"weight_decay/{group.name}": group.options["weight_decay"] for group in groups})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "active": self.active,
            "strength": self._strength,
            "smoothed": self._smoothed,
            "growth": self._growth,
            "measurements": self._measurements,
            "measured_at": self._measured_at,
            "ramped_at": self._ramped_at,
            "own_decay": dict(self._own_decay),
            "set_decay": dict(self._set_decay),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.active = state_dict["active"]
        self._strength = state_dict["strength"]
        self._smoothed = state_dict["smoothed"]
        self._growth = state_dict["growth"]
        self._measurements = state_dict["measurements"]
        self._measured_at = state_dict["measured_at"]
        self._ramped_at = state_dict["ramped_at"]
        self._own_decay = dict(state_dict["own_decay"])
        self._set_decay = dict(state_dict["set_decay"])

    def _watch(self, rms: float, step: int) -> None:
        """Take a measurement into the moving averages."""
        if self._measurements == 0:
            self._smoothed = rms
        else:
            smoothed = self.smoothing * self._smoothed + (1 - self.smoothing) * rms
            slope = (smoothed - self._smoothed) / max(1, step - self._measured_at)
            first = self._measurements == 1
            self._growth = slope if first else self.smoothing * self._growth + (1 - self.smoothing) * slope
            self._smoothed = smoothed
        self._measurements += 1
        self._measured_at = step

    def _decide(self, trainer: Trainer, largest: str) -> None:
        predictable = self._measurements >= MEASUREMENTS_TO_PREDICT
        expected = self._smoothed + (self.horizon * max(0.0, self._growth) if predictable else 0.0)
        state = f"the weight RMS of {largest} is {self._smoothed:.3g} and changes by {self._growth:+.2g} a step"
        if not self.active and expected > self.limit:
            self.active = True
            limit = f"the limit of {self.limit:g}"
            passed = self._smoothed > self.limit
            reason = f"is over {limit}" if passed else f"will pass {limit} within {self.horizon} steps"
            self._announce(trainer, f"on: {state}; it {reason}", self.weight_decay)
        elif self.active and self._smoothed < self.release * self.limit and expected <= self.limit:
            self.active = False
            self._announce(trainer, f"off: {state}, safely under the limit of {self.limit:g}", None)

    def _announce(self, trainer: Trainer, decision: str, target: float | None) -> None:
        goal = "what it was" if target is None else f"{target:g}"
        message = (
            f"AutoWeightDecay, step {trainer.global_step}: {decision}."
            f" Weight decay goes to {goal} in {self.ramp_steps} steps."
        )
        rank_zero_info(message)
        log_text(trainer, "weight_decay/decisions", message)
