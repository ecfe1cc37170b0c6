"""Limits of measured quantities: a monitor warns once when one is passed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_muon.callbacks.arguments import is_number
from lightning_muon.callbacks.logging import logged_step, warn
from lightning_muon.report.quantities import quantity


@dataclass
class Limit:
    """A limit that is warned of once in a run.

    Args:
        monitor: The name of the monitor.
        argument: Its argument that sets the limit: ``min_…`` for the least healthy value, ``max_…`` for the largest.
        bound: The limit; ``None`` is no limit.
        quantity: What is limited, in words.
        advice: What to do.
        smallest: The smallest valid bound.

    Raises:
        MisconfigurationException: If the bound is not valid.
    """

    monitor: str
    argument: str
    bound: float | None
    quantity: str
    advice: str
    smallest: float = 0
    told: bool = False

    def __post_init__(self) -> None:
        if self.bound is not None and not (is_number(self.bound) and self.smallest <= self.bound < math.inf):
            raise MisconfigurationException(
                f"{self.monitor}: {self.argument} must be at least {self.smallest} and finite, or null for no limit,"
                f" got {self.bound!r}"
            )

    def watch(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Warn of the value that is farthest beyond the limit, the first time that there is one; NaN is ignored."""
        if self.bound is None or self.told:
            return
        is_least = self.argument.startswith("min_")
        sign = -1.0 if is_least else 1.0
        beyond = {name: value for name, value in values.items() if sign * value > sign * self.bound}
        if not beyond:
            return
        self.told = True
        name = max(beyond, key=lambda name: sign * beyond[name])
        relation = "under" if is_least else "over"
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        warn(
            trainer,
            f"{self.monitor}, step {logged_step(trainer)}: {self.quantity} is {beyond[name]:.3g} in {name}{others},"
            f" {relation} {self.argument}={self.bound:g}. {self.advice} This is said once.",
        )


def advice(name: str) -> str:
    """Return the advice of the table of quantities, as a sentence."""
    text = quantity(name).advice
    return f"{text[0].upper()}{text[1:]}."
