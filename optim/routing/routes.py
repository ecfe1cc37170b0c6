"""What a rule says, what a route is, and the routes of what is left out."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.optim.routing.roles import Confidence, RoleName
from lightning_muon.optim.sharding.sharding import Sharding
from lightning_muon.optim.sharding.wrappers import reduce_unfrozen
from lightning_muon.optim.update.matrix_layout import MatrixLayout

Choice = Literal["muon", "adamw", "frozen"]
ORDER = get_args(Choice)


@dataclass(frozen=True)
class Rule:
    """Route parameters whose name matches a pattern, instead of by their role.

    Args:
        pattern: Shell-style pattern for the full name, such as ``"*.head.weight"``.
        algorithm: ``"muon"``, ``"adamw"``, or ``"frozen"``: they are in no group, and no optimizer touches them. Their
            gradients are still computed; ``requires_grad_(False)`` saves that as well.
        options: Hyperparameters of these parameters, such as ``{"lr": 1e-4}``; they get a group of their own.
        layout: Where the matrices are, if the role does not say: see :class:`MatrixLayout`.
    """

    pattern: str
    algorithm: Choice
    options: dict[str, Any] = field(default_factory=dict)
    layout: MatrixLayout | None = None


@dataclass(frozen=True)
class Route:
    """The algorithm and the role of one parameter, and the reason.

    Args:
        name: As ``named_parameters()`` gives it, without the prefixes of wrappers.
        parameter: The parameter.
        algorithm: ``"muon"``, ``"adamw"``, or ``"frozen"`` if it takes no gradient or a rule says so.
        role: What it is in the model, see :data:`~lightning_muon.optim.routing.roles.RoleName`.
        reason: Why this algorithm, in one line.
        layout: Where the matrices of a muon parameter are.
        options: Hyperparameters that differ from the optimizer's.
        confidence: How sure the role is; what a rule says is ``"known"``.
        sharding: Its sharding, if it is distributed over ranks and no DTensor.
        trained: Its route if it took a gradient, where it takes none.
        optimizer: The class that updates it, in a run whose optimizer does not heed the algorithm.
    """

    name: str
    parameter: nn.Parameter
    algorithm: Choice
    role: RoleName
    reason: str
    layout: MatrixLayout = field(default_factory=MatrixLayout)
    options: Mapping[str, Any] = field(default_factory=dict)
    confidence: Confidence = "known"
    sharding: Sharding | None = None
    trained: "Route | None" = None
    optimizer: str | None = None

    @property
    def updated_by(self) -> str:
        """What updates it, an algorithm or the class of an optimizer."""
        return self.optimizer or self.algorithm

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter, of which this rank may have only a shard."""
        return self.parameter.shape if self.sharding is None else self.sharding.shape


class LeftOut(dict[Tensor, Route]):
    """The routes of parameters that are in no group, by parameter: what they would be if they were trained.

    Parameters belong to a run, so copies and checkpoints of a group contain an empty dictionary instead.

    Args:
        routes: The parameters with their routes.
        wrappers: The wrappers that must learn when a parameter is unfrozen.
    """

    def __init__(
        self, routes: Iterable[tuple[Tensor, Route]] = (), wrappers: Iterable[DistributedDataParallel] = ()
    ) -> None:
        super().__init__(routes)
        self.wrappers = list(wrappers)

    def unfreeze(self, parameters: Iterable[Tensor]) -> None:
        """Let parameters take gradients, reduced over the ranks of DDP, if they were left out."""
        added = [parameter.requires_grad_(True) for parameter in parameters if parameter in self]
        for wrapper in self.wrappers if added else ():
            reduce_unfrozen(wrapper)

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[()]]:
        """Pickle as an empty container that ``torch.load`` also takes with ``weights_only=True``."""
        return OrderedDict, ()
