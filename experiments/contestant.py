"""An optimizer that takes part in a comparison, and its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What is tuned of an optimizer.

    Args:
        lr: The learning rate of the hidden matrices, and of all that has no rate of its own.
        weight_decay: ``None`` if the optimizer has none.
        rates: The learning rates of the other roles; empty if its groups have no roles.
    """

    lr: float
    weight_decay: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Return the settings as options of a trial."""
        decay = {} if self.weight_decay is None else {"model.optimizer.weight_decay": self.weight_decay}
        rates = {"model.lr_by_role": dict(self.rates)} if self.rates else {}
        return {"model.optimizer.lr": self.lr, **decay, **rates}

    def values(self) -> dict[str, float]:
        """Return the settings by name: ``lr``, ``weight_decay``, and roles."""
        decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return {"lr": self.lr, **decay, **self.rates}

    def __str__(self) -> str:
        """Return a name for folders."""
        return ",".join(f"{name.replace('weight_decay', 'wd')}={value:g}" for name, value in self.values().items())


@dataclass(frozen=True)
class Contestant:
    """An optimizer with the settings at which its tuning starts.

    Args:
        name: As in the tables.
        configs: Config files or names of presets that choose it.
        start: Its settings there.
        coupled: Roles whose rates follow ``lr`` there, because they have none of their own.
    """

    name: str
    configs: tuple[str, ...]
    start: Settings
    coupled: frozenset[str] = frozenset()
