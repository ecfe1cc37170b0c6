"""Points in a run, and the piecewise linear function through them."""

import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_muon.callbacks.arguments import is_number, is_whole

_PERCENT = re.compile(r"(\d+(?:\.\d*)?)\s*%")
_WHOLE = re.compile(r"-?\d+")


class Place(NamedTuple):
    """A place in a run: a step from 0 on, one that is counted from the end (-1 is the last), or a percentage."""

    given: str
    number: float
    is_percent: bool

    @classmethod
    def of(cls, argument: str, given: object) -> "Place":
        """Read a place; a text may also be a number, as a key in JSON is.

        Raises:
            MisconfigurationException: If it is none of the three.
        """
        if isinstance(given, str):
            if (percent := _PERCENT.fullmatch(given.strip())) and float(percent[1]) <= 100:
                return cls(given.strip(), float(percent[1]), is_percent=True)
            if _WHOLE.fullmatch(given.strip()):
                return cls(given.strip(), int(given), is_percent=False)
        if is_whole(given):
            return cls(str(given), given, is_percent=False)
        raise MisconfigurationException(
            f"{argument} has the place {given!r}: write a step such as 300, a step from the end such as -50, or a part"
            " of the run such as '80%'"
        )

    @property
    def is_relative(self) -> bool:
        """Whether it depends on the length of the run."""
        return self.is_percent or self.number < 0

    def step(self, steps: int) -> float:
        """Return the step in a run of so many steps; that of a percentage may be a fraction."""
        if self.is_percent:
            return self.number / 100 * (steps - 1)
        return self.number + steps if self.number < 0 else self.number


class PiecewiseLinear:
    """The function that is linear between its points, and constant before the first and after the last.

    Args:
        points: Step and value of each, in increasing order of the steps.
    """

    def __init__(self, points: list[tuple[float, float]]) -> None:
        self.points = points

    def __call__(self, step: float) -> float:
        """Return the value at a step; that of a point is exact."""
        after = bisect_right(self.points, step, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return self.points[max(after - 1, 0)][1]
        (start, value), (end, next_value) = self.points[after - 1 : after + 1]
        return value + (next_value - value) * ((step - start) / (end - start))


class Points:
    """Values by their places in a run.

    Args:
        argument: The callback and its argument, for messages: ``"HyperparameterSchedule: points"``.
        given: From places (see :class:`Place`) to values, in the order of the run.
        below: The bound below which the values must be.

    Raises:
        MisconfigurationException: If a place or value is wrong, or there are none.
    """

    def __init__(self, argument: str, given: Mapping[int | str, float], below: float = math.inf) -> None:
        if not isinstance(given, Mapping) or not given:
            raise MisconfigurationException(
                f"{argument} must map places in the run to values, such as {{0: 0.85, 300: 0.95, '100%': 0.85}}, got"
                f" {given!r}"
            )
        for place, value in given.items():
            if not (is_number(value) and 0 <= value < below):
                bound = "finite" if below == math.inf else f"below {below:g}"
                raise MisconfigurationException(
                    f"{argument}[{place!r}] must be a number from 0 on and {bound}, got {value!r}"
                )
        self._argument = argument
        self._points = [(Place.of(argument, place), float(value)) for place, value in given.items()]

    def __str__(self) -> str:
        return ", ".join(f"{place.given}: {value:g}" for place, value in self._points)

    @property
    def at_the_start(self) -> float:
        """The value in step 0, whatever the length of the run."""
        return self._points[0][1]

    @property
    def relative(self) -> list[str]:
        """The places that depend on the length of the run."""
        return [place.given for place, _ in self._points if place.is_relative]

    def in_a_run(self, steps: int | None) -> PiecewiseLinear:
        """Return the function in a run of so many steps; ``None`` if that is not known.

        Raises:
            MisconfigurationException: If places are outside of the run, are not increasing, or depend on its length and
                that is not known.
        """
        if steps is None and self.relative:
            raise MisconfigurationException(
                f"{self._argument} has {self.relative[0]}, but the number of steps of this run is not known: set"
                " trainer.max_steps, or count all places from the start"
            )
        points = [(place.step(steps or 0), value) for place, value in self._points]
        run = "" if steps is None else f" in this run of {steps} steps"
        for index, (step, _) in enumerate(points):
            place = self._points[index][0].given
            if steps is not None and not 0 <= step <= steps - 1:
                raise MisconfigurationException(
                    f"{self._argument} has {place}, but the run has {steps} steps, 0 to {steps - 1}"
                )
            if index > 0 and step <= points[index - 1][0]:
                raise MisconfigurationException(
                    f"{self._argument} must increase from place to place, but{run} {place} is step {step:g} and"
                    f" {self._points[index - 1][0].given} before it step {points[index - 1][0]:g}"
                )
        return PiecewiseLinear(points)
