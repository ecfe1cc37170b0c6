"""Limits of what is measured, and what one is told, once, when one is passed."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_muon.callbacks.arguments import is_number
from lightning_muon.callbacks.logging import logged_step, warn


@dataclass
class Limit:
    """A limit that one is told of once a run.

    Args:
        monitor: Who warns.
        argument: The name of the argument that sets the limit.
        bound: The limit; None is none.
        quantity: What is limited, in words.
        advice: What to do.
        is_least: The bound is the least healthy value, not the largest.

    Raises:
        MisconfigurationException: If the bound is negative.
    """

    monitor: str
    argument: str
    bound: float | None
    quantity: str
    advice: str
    is_least: bool = False
    told: bool = False

    def __post_init__(self) -> None:
        if self.bound is not None and not (is_number(self.bound) and self.bound >= 0):
            raise MisconfigurationException(
                f"{self.monitor}: {self.argument} must be at least 0, or null for no limit, got {self.bound!r}"
            )

    def watch(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Warn of the layer that is farthest beyond the limit, if it is the first time; NaN is another's business."""
        if self.bound is None or self.told or not values:
            return
        sign = -1.0 if self.is_least else 1.0
        beyond = {name: value for name, value in values.items() if sign * value > sign * self.bound}
        if not beyond:
            return
        self.told = True
        name = max(beyond, key=lambda name: sign * beyond[name])
        relation = "under" if self.is_least else "over"
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        warn(
            trainer,
            f"{self.monitor}, step {logged_step(trainer)}: {self.quantity} is {beyond[name]:.3g} in {name}{others},"
            f" {relation} {self.argument}={self.bound:g}. {self.advice} This is said once.",
        )
