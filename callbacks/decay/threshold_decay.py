"""A constant weight decay that is turned on over a limit, and off again well below it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_muon.callbacks.decay.decay_control import DecayControl, Ramp, Size, WeightSet

# The slope of the first few measurements is that of the warm-up; it predicts nothing.
MEASUREMENTS_TO_PREDICT = 5


@dataclass
class Course(Ramp):
    """Where a run stands.

    Args:
        smoothed: Moving average of the largest RMS.
        growth: Moving average of its change, per step.
        measurements: How many there were.
        measured_at: Step of the last one.
    """

    smoothed: float = 0.0
    growth: float = 0.0
    measurements: int = 0
    measured_at: int = 0


class ThresholdDecay(DecayControl):
    """Watch the largest RMS of all matrices, whatever their set.

    The arguments are those of :class:`~lightning_muon.callbacks.AutoWeightDecay`.
    """

    def __init__(
        self, limit: float, weight_decay: float, horizon: int, ramp_steps: int, release: float, smoothing: float
    ) -> None:
        self.limit = limit
        self.weight_decay = weight_decay
        self.horizon = horizon
        self.ramp_steps = ramp_steps
        self.release = release
        self.smoothing = smoothing
        self._course = Course()

    @property
    @override
    def active(self) -> bool:
        return self._course.active

    @override
    def advance(self, step: int) -> None:
        self._course.advance(step, self.ramp_steps)

    @override
    def decay(self, name: str, own: float) -> float:
        return self._course.between(own, max(own, self.weight_decay))

    @override
    def took(self, name: str, lr: float | Tensor, decay: float) -> None:
        """Only measurements count here."""

    @override
    def judge(self, step: int, sizes: Mapping[str, Size], sets: Mapping[str, WeightSet]) -> str | None:
        if not sizes:
            return None
        rms = {name: size.rms for name, size in sizes.items()}
        largest = max(rms, key=rms.__getitem__)
        self._watch(rms[largest], step)
        return self._decide(largest, rms[largest])

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self._course)

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._course = Course(**state)

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

    def _decide(self, largest: str, now: float) -> str | None:
        course = self._course
        predictable = course.measurements >= MEASUREMENTS_TO_PREDICT
        expected = course.smoothed + (self.horizon * max(0.0, course.growth) if predictable else 0.0)
        state = (
            f"the weight RMS of {largest} is {now:.3g}, smoothed {course.smoothed:.3g},"
            f" and changes by {course.growth:+.2g} a step"
        )
        ramp = f"in {self.ramp_steps} steps."
        if not course.active and expected > self.limit:
            course.active = True
            limit = f"the limit of {self.limit:g}"
            passed = course.smoothed > self.limit
            reason = f"is over {limit}" if passed else f"will pass {limit} within {self.horizon} steps"
            return f"on: {state}; it {reason}. Weight decay goes to {self.weight_decay:g}, where it is less, {ramp}"
        if course.active and course.smoothed < self.release * self.limit and expected <= self.limit:
            course.active = False
            return f"off: {state}, safely under the limit of {self.limit:g}. Weight decay goes to what it was {ramp}"
        return None
