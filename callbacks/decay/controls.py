"""The two ways to decide on weight decays: a constant one over a limit, and one computed for a target."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, cast

from torch import Tensor
from typing_extensions import override

from lightning_muon.callbacks.arguments import some
from lightning_muon.callbacks.decay.target_decay import Aim, Bf16Target, Reasoning, TargetDecay

# The slope of the first measurements is that of the warm-up, and predicts nothing.
MEASUREMENTS_TO_PREDICT = 5


class MatrixSize(NamedTuple):
    """The size of a matrix."""

    norm: float  # Euclidean, of the entries
    entries: float  # their number

    @property
    def rms(self) -> float:
        """Root mean square of the entries."""
        return self.norm / math.sqrt(self.entries)


class MatrixSet(NamedTuple):
    """Matrices that get the same decay."""

    group: str  # label
    lr: float  # of the group
    planned_lr: float  # see target_decay.planned_lr
    matrices: Sequence[str]  # names


@dataclass
class Ramp:
    """A linear ramp from each group's own decay to the wanted one, in logged steps."""

    active: bool = False  # while ramping up, and at the top
    strength: float = 0.0  # position: 0 is the own decay, 1 the wanted one
    ramped_at: int = 0  # step of the last update

    def advance(self, step: int, ramp_steps: int) -> None:
        """Move up to a step."""
        change = (step - self.ramped_at) / ramp_steps
        self.strength = min(1.0, max(0.0, self.strength + (change if self.active else -change)))
        self.ramped_at = step

    def between(self, own: float, wanted: float) -> float:
        """Return the decay at the current position."""
        return own + self.strength * (wanted - own)


@dataclass
class ThresholdState(Ramp):
    """What :class:`ThresholdControl` saves in checkpoints."""

    smoothed: float = 0.0  # moving average of the largest RMS
    growth: float = 0.0  # moving average of its change per step
    measurements: int = 0
    measured_at: int = 0  # step of the last measurement


class DecayControl(ABC):
    """Decide on the decay of sets of matrices; a set has the name of its group, or of its only matrix."""

    ramp: Ramp

    @abstractmethod
    def decay(self, name: str, own: float) -> float:
        """Return the decay of the next step of a set, given that of its group."""

    @abstractmethod
    def took(self, name: str, lr: float | Tensor, decay: float) -> None:
        """Record a step of a set."""

    @abstractmethod
    def judge(self, step: int, sizes: Mapping[str, MatrixSize], sets: Mapping[str, MatrixSet]) -> str | None:
        """Use the sizes of those matrices whose norm is finite; return the decision and its reason, if there is one."""

    @abstractmethod
    def rename(self, labels: Mapping[str, str]) -> None:
        """Take over what a checkpoint says of groups under earlier labels; ``labels`` are from present to earlier."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, in plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""


@dataclass
class ThresholdControl(DecayControl):
    """Turn a constant decay on when the largest RMS of all matrices passes a limit, and off well below it.

    The arguments are those of :class:`~lightning_muon.callbacks.AutoWeightDecay`.
    """

    limit: float
    weight_decay: float
    horizon: int
    ramp_steps: int
    release: float
    smoothing: float
    ramp: ThresholdState = field(default_factory=ThresholdState)

    @override
    def decay(self, name: str, own: float) -> float:
        return self.ramp.between(own, max(own, self.weight_decay))

    @override
    def took(self, name: str, lr: float | Tensor, decay: float) -> None:
        """Do nothing: this control depends on measurements alone."""

    @override
    def rename(self, labels: Mapping[str, str]) -> None:
        """Do nothing: this control judges all groups together."""

    @override
    def judge(self, step: int, sizes: Mapping[str, MatrixSize], sets: Mapping[str, MatrixSet]) -> str | None:
        if not sizes:
            return None
        rms = {name: size.rms for name, size in sizes.items()}
        largest = max(rms, key=rms.__getitem__)
        self._update_averages(rms[largest], step)
        return self._decide(largest, rms[largest])

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self.ramp)

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ramp = ThresholdState(**state)

    def _update_averages(self, rms: float, step: int) -> None:
        state = self.ramp
        if state.measurements == 0:
            state.smoothed = rms
        else:
            smoothed = self.smoothing * state.smoothed + (1 - self.smoothing) * rms
            slope = (smoothed - state.smoothed) / max(1, step - state.measured_at)
            first = state.measurements == 1
            state.growth = slope if first else self.smoothing * state.growth + (1 - self.smoothing) * slope
            state.smoothed = smoothed
        state.measurements += 1
        state.measured_at = step

    def _decide(self, largest: str, now: float) -> str | None:
        state = self.ramp
        predictable = state.measurements >= MEASUREMENTS_TO_PREDICT
        expected = state.smoothed + (self.horizon * max(0.0, state.growth) if predictable else 0.0)
        found = (
            f"the weight RMS of {largest} is {now:.3g}, smoothed {state.smoothed:.3g},"
            f" and changes by {state.growth:+.2g} a step"
        )
        ramp = f"in {self.ramp_steps} steps."
        if not state.active and expected > self.limit:
            state.active = True
            limit = f"the limit of {self.limit:g}"
            passed = state.smoothed > self.limit
            reason = f"is over {limit}" if passed else f"will pass {limit} within {self.horizon} steps"
            return f"on: {found}; it {reason}. Weight decay goes to {self.weight_decay:g}, where it is less, {ramp}"
        if state.active and state.smoothed < self.release * self.limit and expected <= self.limit:
            state.active = False
            return f"off: {found}, safely under the limit of {self.limit:g}. Weight decay goes to what it was {ramp}"
        return None


@dataclass
class TargetControl(DecayControl):
    """Compute the decay of each set from the growth that its updates cause, to bring it to a target."""

    target_rms: float | None  # None: for each group, the RMS at which the headroom in bfloat16 ends
    aim: Aim
    ramp_steps: int
    ramp: Ramp = field(default_factory=Ramp)
    decays: defaultdict[str, TargetDecay] = field(default_factory=lambda: defaultdict(TargetDecay))  # by set
    bf16_targets: defaultdict[str, Bf16Target] = field(default_factory=lambda: defaultdict(Bf16Target))  # by group

    @override
    def decay(self, name: str, own: float) -> float:
        wanted = self.decays[name].decay if name in self.decays else None
        return own if wanted is None else self.ramp.between(own, wanted)

    @override
    def took(self, name: str, lr: float | Tensor, decay: float) -> None:
        if name in self.decays:  # from the first measurement on
            self.decays[name].took(lr, decay)

    def saw_update(self, group: str, rms: float) -> None:
        """Record the RMS of an update of a group, per unit of the learning rate."""
        if 0 < rms < math.inf:
            self.bf16_targets[group].saw(rms, self.aim.smoothing)

    @override
    def rename(self, labels: Mapping[str, str]) -> None:
        for kept in cast("tuple[dict[str, Any], ...]", (self.decays, self.bf16_targets)):
            missing = {label: earlier for label, earlier in labels.items() if label not in kept and earlier in kept}
            kept.update({label: deepcopy(kept[earlier]) for label, earlier in missing.items()})
            for earlier in {*missing.values()} - labels.keys():
                del kept[earlier]

    @override
    def judge(self, step: int, sizes: Mapping[str, MatrixSize], sets: Mapping[str, MatrixSet]) -> str | None:
        news: dict[str, Reasoning] = {}
        for one in {one.group: one for one in sets.values()}.values():
            self.bf16_targets[one.group].saw_lr(one.lr, one.planned_lr)
        for name, one in sets.items():
            target = self.bf16_targets[one.group].rms if self.target_rms is None else self.target_rms
            decay = self.decays[name]
            left_out = [matrix for matrix in one.matrices if matrix not in sizes]
            reasoning = decay.measure(_rms(one.matrices, sizes), left_out, target, self.aim)
            if reasoning and decay.is_news(self.aim.bounds):
                news[name] = reasoning
                decay.told = decay.decay
        return self._decision(news, sets) if news else None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.ramp),
            "sets": {name: decay.state() for name, decay in self.decays.items()},
            "bf16": {group: asdict(target) for group, target in self.bf16_targets.items()},
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.decays.update({name: TargetDecay(**decay) for name, decay in state.pop("sets").items()})
        self.bf16_targets.update({group: Bf16Target(**target) for group, target in state.pop("bf16").items()})
        self.ramp = Ramp(**state)

    def _decision(self, news: Mapping[str, Reasoning], sets: Mapping[str, MatrixSet]) -> str:
        """Give the reason for the set with the largest decay, and list the others."""
        name = max(news, key=lambda name: news[name].decay)
        source = f" (the target is {self.bf16_targets[sets[name].group]})" if self.target_rms is None else ""
        others = [f"{other} to {news[other].decay:.3g}" for other in news if other != name]
        also = f" Likewise {some(others)}." if others else ""
        ramp = "" if self.ramp.active else f" All change over from their own decay in {self.ramp_steps} steps."
        self.ramp.active = True
        return f"weight decay of {name} goes to {news[name].decay:.3g}: {news[name]}{source}.{also}{ramp}"


def _rms(matrices: Sequence[str], sizes: Mapping[str, MatrixSize]) -> float:
    """Return the root mean square over all entries of those matrices that have a size; 0 if none has."""
    found = [sizes[matrix] for matrix in matrices if matrix in sizes]
    entries = sum(size.entries for size in found)
    return (sum(size.norm**2 for size in found) / entries) ** 0.5 if entries else 0.0
