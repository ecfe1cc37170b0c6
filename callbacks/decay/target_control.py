"""The weight decays that steer several sets of matrices, each to its target."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_muon.callbacks.decay.bf16_target import Bf16Target
from lightning_muon.callbacks.decay.decay_control import DecayControl, Ramp, Size, WeightSet
from lightning_muon.callbacks.decay.target_decay import Aim, Reasoning, TargetDecay
from lightning_muon.callbacks.name_choice import some


class TargetControl(DecayControl):
    """Compute a decay for each set from the growth that its updates cause.

    Args:
        target_rms: Of all sets; None is the RMS at which the headroom in bfloat16 ends, of each group.
        aim: How it is approached.
        ramp_steps: Steps from each group's own decay to the computed one.
    """

    def __init__(self, target_rms: float | None, aim: Aim, ramp_steps: int) -> None:
        self.target_rms = target_rms
        self.aim = aim
        self.ramp_steps = ramp_steps
        self._ramp = Ramp()
        self._sets: defaultdict[str, TargetDecay] = defaultdict(TargetDecay)
        self._of_bf16: defaultdict[str, Bf16Target] = defaultdict(Bf16Target)

    @property
    @override
    def active(self) -> bool:
        return self._ramp.active

    @override
    def advance(self, step: int) -> None:
        self._ramp.advance(step, self.ramp_steps)

    @override
    def decay(self, name: str, own: float) -> float:
        wanted = self._sets[name].decay if name in self._sets else None
        return own if wanted is None else self._ramp.between(own, wanted)

    @override
    def took(self, name: str, lr: float | Tensor, decay: float) -> None:
        if name in self._sets:  # it has been measured
            self._sets[name].took(lr, decay)

    def saw_update(self, group: str, rms: float) -> None:
        """Hear how large an update of a group was, per unit of the learning rate."""
        if 0 < rms < float("inf"):
            self._of_bf16[group].saw(rms, self.aim.smoothing)

    @override
    def judge(self, step: int, sizes: Mapping[str, Size], sets: Mapping[str, WeightSet]) -> str | None:
        news: dict[str, Reasoning] = {}
        for weights in {weights.group: weights for weights in sets.values()}.values():
            self._of_bf16[weights.group].saw_lr(weights.lr, weights.planned_lr)
        for name, weights in sets.items():
            of_bf16 = self._of_bf16[weights.group]
            target = of_bf16.rms if self.target_rms is None else self.target_rms
            decay = self._sets[name]
            left_out = [matrix for matrix in weights.matrices if matrix not in sizes]
            reasoning = decay.measure(_rms(weights.matrices, sizes), left_out, target, self.aim)
            if reasoning and decay.is_news(self.aim.bounds):
                news[name] = reasoning
        if not news:
            return None
        for name in news:
            self._sets[name].told = self._sets[name].decay
        return self._told(news, sets)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **asdict(self._ramp),
            "sets": {name: decay.state() for name, decay in self._sets.items()},
            "bf16": {group: asdict(target) for group, target in self._of_bf16.items()},
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self._sets.update({name: TargetDecay(**decay) for name, decay in state.pop("sets").items()})
        self._of_bf16.update({group: Bf16Target(**target) for group, target in state.pop("bf16").items()})
        self._ramp = Ramp(**state)

    def _told(self, news: Mapping[str, Reasoning], sets: Mapping[str, WeightSet]) -> str:
        """Tell of the set with the largest decay, and name the others."""
        name = max(news, key=lambda name: news[name].decay)
        source = f" (the target is {self._of_bf16[sets[name].group]})" if self.target_rms is None else ""
        others = [f"{other} to {news[other].decay:.3g}" for other in news if other != name]
        also = f" Likewise {some(others)}." if others else ""
        ramp = "" if self._ramp.active else f" All change over from their own decay in {self.ramp_steps} steps."
        self._ramp.active = True
        return f"weight decay of {name} goes to {news[name].decay:.3g}: {news[name]}{source}.{also}{ramp}"


def _rms(matrices: Sequence[str], sizes: Mapping[str, Size]) -> float:
    """Return the root mean square over all entries of those matrices that have a size; 0 if none has."""
    found = [sizes[matrix] for matrix in matrices if matrix in sizes]
    entries = sum(size.entries for size in found)
    return (sum(size.norm**2 for size in found) / entries) ** 0.5 if entries else 0.0
