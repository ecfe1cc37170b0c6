"""The options of a parameter group, by name and type."""

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
