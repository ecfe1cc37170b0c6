"""What AutoWeightDecay leaves to a control: to judge what was measured, and to say which decay the next steps take."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Size(NamedTuple):
    """How large a matrix is.

    Args:
        norm: Euclidean norm of its entries.
        entries: How many there are.
    """

    norm: float
    entries: float

    @property
    def rms(self) -> float:
        """Root mean square of the entries."""
        return self.norm / math.sqrt(self.entries)


class WeightSet(NamedTuple):
    """Matrices that take the same decay.

    Args:
        group: The group that they are in, as it is logged.
        lr: The group's learning rate.
        planned_lr: The one that its schedule starts from, or rises to; 0 without a schedule.
        matrices: Their names.
    """

    group: str
    lr: float
    planned_lr: float
    matrices: Sequence[str]


@dataclass
class Ramp:
    """A linear way from each group's own decay to the one that is wanted; steps are counted as they are logged.

    Args:
        active: Whether the way leads there; otherwise it leads back.
        strength: Place on it: 0 is the own decay, 1 is the wanted one.
        ramped_at: Step up to which it was gone.
    """

    active: bool = False
    strength: float = 0.0
    ramped_at: int = 0

    def advance(self, step: int, ramp_steps: int) -> None:
        """Go on by the steps that were taken."""
        change = (step - self.ramped_at) / ramp_steps
        self.strength = min(1.0, max(0.0, self.strength + (change if self.active else -change)))
        self.ramped_at = step

    def between(self, own: float, wanted: float) -> float:
        """Return the decay at this place of the way."""
        return own + self.strength * (wanted - own)


class DecayControl(ABC):
    """Decide on the decay of sets of matrices, each set by the name of its group or of its only matrix."""

    @abstractmethod
    def advance(self, step: int) -> None:
        """Go along the ramp up to this step."""

    @abstractmethod
    def decay(self, name: str, own: float) -> float:
        """Return the decay that the next step of a set takes, given that of its group."""

    @abstractmethod
    def judge(self, step: int, sizes: Mapping[str, Size], sets: Mapping[str, WeightSet]) -> str | None:
        """Take in a measurement, and return what was decided, with the reason, if that is worth telling.

        Args:
            step: Of the measurement.
            sizes: The matrices whose norm is finite.
            sets: What to decide on, by name.
        """

    @abstractmethod
    def took(self, name: str, lr: float | Tensor, decay: float) -> None:
        """Hear that a set took a step."""

    @property
    @abstractmethod
    def active(self) -> bool:
        """Whether the control has an effect, or is on the way to it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return where the control stands, in plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
