"""The options of a parameter group, by name and type."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

from lightning_muon.optim.polar.orthogonalize import Orthogonalizer
from lightning_muon.optim.update.scale import UpdateScale

Algorithm = Literal["muon", "adamw"]
ALGORITHMS = get_args(Algorithm)
CommunicationDtype = Literal["bfloat16", "float32"]
MomentumDtype = Literal["float32", "bfloat16", "int8"]


class SharedOptions(TypedDict):
    """Options of both algorithms; see :class:`~lightning_muon.optim.MuonAdamW` for the meaning of each."""

    lr: float
    weight_decay: float
    cautious_weight_decay: bool
    batch_elements: int | None
    momentum_dtype: MomentumDtype | None


class MuonOptions(SharedOptions):
    """Options of a muon group."""

    momentum: float
    nesterov: bool
    orthogonalizer: Orthogonalizer
    orthogonalizer_options: dict[str, Any]
    update_scale: UpdateScale
    polar_first: bool
    neuron_beta: float | None
    fixed_norm: float | None
    compile: bool
    communication_dtype: CommunicationDtype | None


class AdamWOptions(SharedOptions):
    """Options of an adamw group."""

    betas: tuple[float, float]
    eps: float


# The options that the parameters of a batch have in common. The others are read for each parameter.
_OF_A_BATCH = {
    "adamw": ("batch_elements",),
    "muon": (
        "batch_elements",
        "nesterov",
        "orthogonalizer",
        "orthogonalizer_options",
        "update_scale",
        "polar_first",
        "compile",
        "communication_dtype",
        "momentum_dtype",
    ),
}


def alike(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what two groups have in common whose parameters can be updated in one batch."""
    options = (repr(group[option]) for option in _OF_A_BATCH[group["algorithm"]])
    switches = (repr(group[option] is None) for option in ("neuron_beta", "fixed_norm"))
    return group["algorithm"], *options, *switches


def algorithm_of(optimizer: object, group: Mapping[str, Any]) -> str:
    """Return what updates a group: its algorithm if the optimizer heeds it, or else the class of the optimizer.

    Every optimizer of torch takes groups with an ``algorithm``, and most do nothing with it. One that heeds it says so
    by ``register_orthogonalize_hook``.
    """
    heeds = "algorithm" in group and hasattr(optimizer, "register_orthogonalize_hook")
    return str(group["algorithm"]) if heeds else type(optimizer).__name__


def check_number(label: str, key: str, value: Any, low: float, high: float | None = None) -> None:
    """Raise a ValueError if a value is not a finite number that is at least ``low`` and, if given, below ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{label}: {key} must be a number, got {value!r}")
    if not low <= value < (math.inf if high is None else high):
        bound = "finite" if high is None else f"below {high:g}"
        raise ValueError(f"{label}: {key} must be at least {low:g} and {bound}, got {value}")
