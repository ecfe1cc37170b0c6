"""The options of a parameter group, by name and type."""

from typing import Any, Literal, TypedDict, get_args

from lightning_muon.optim.polar.orthogonalize import Orthogonalizer
from lightning_muon.optim.update.scale import UpdateScale

Algorithm = Literal["muon", "adamw"]
ALGORITHMS = get_args(Algorithm)
CommunicationDtype = Literal["bfloat16", "float32"]


class SharedOptions(TypedDict):
    """Options of both algorithms; see :class:`~lightning_muon.optim.MuonAdamW` for the meaning of each."""

    lr: float
    weight_decay: float
    cautious_weight_decay: bool
    batch_elements: int | None


class MuonOptions(SharedOptions):
    """Options of a muon group."""

    momentum: float
    nesterov: bool
    orthogonalizer: Orthogonalizer
    orthogonalizer_options: dict[str, Any]
    update_scale: UpdateScale
    polar_first: bool
    neuron_beta: float | None
    compile: bool
    communication_dtype: CommunicationDtype | None


class AdamWOptions(SharedOptions):
    """Options of an adamw group."""

    betas: tuple[float, float]
    eps: float
