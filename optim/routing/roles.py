"""The roles of parameters, and the algorithm that fits each."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.optim.update.options import Algorithm

RoleName = Literal["matrix", "router", "embedding", "head", "adapter", "vector", "other"]
"""What a parameter is in its model: each role has groups of its own, and may have a learning rate of its own.

- ``matrix``: hidden matrices, in layers, convolutions, recurrent layers, stacks of experts; Muon's.
- ``router``: the matrices by which tokens choose their experts; Muon's.
- ``embedding``: tables, also of positions.
- ``head``: output layers. A weight that is tied to an embedding is a head: each step moves all of its rows.
- ``adapter``: the small matrices of LoRA and of the other methods that train a model without its own weights.
- ``vector``: biases, scales and shifts, whatever their shape, and layers with one output or one input.
- ``other``: what only AdamW fits: bilinear forms, filters of depthwise convolutions, parameters of unknown role.
"""
ROLES: tuple[RoleName, ...] = get_args(RoleName)
Confidence = Literal["known", "by name", "guess"]
"""How sure a role is: by the class of its module or the structure of the model; by a name that is usual; or a guess."""
MUON_ROLES = frozenset[RoleName]({"matrix", "router"})
"""The roles that Muon updates unless a rule says otherwise; AdamW updates the others."""


@dataclass(frozen=True)
class Role:
    """The role of a parameter, its algorithm, where its matrices are, and why.

    Args:
        name: The role.
        algorithm: ``"muon"`` or ``"adamw"``.
        reason: One line for the routing table.
        layout: Where the matrices are; for adamw only where a rule may choose muon.
        is_embedding: Whether it is the table of an embedding, to which a head may be tied.
        is_layer: Whether it is the weight of a linear or convolutional layer, which may be an output head.
        decay: Whether it gets weight decay; vectors get none.
        confidence: How sure this is.
    """

    name: RoleName
    algorithm: Algorithm
    reason: str
    layout: MatrixLayout = field(default_factory=MatrixLayout)
    is_embedding: bool = False
    is_layer: bool = False
    decay: bool = True
    confidence: Confidence = "known"


def vector(reason: str = "vector", confidence: Confidence = "known") -> Role:
    """Return the role of biases, scales and shifts."""
    return Role("vector", "adamw", reason, decay=False, confidence=confidence)


def matrices(
    layout: MatrixLayout,
    reason: str,
    fused: str = "",
    *,
    name: RoleName = "matrix",
    is_layer: bool = False,
    confidence: Confidence = "known",
) -> Role:
    """Return the role of matrices of Muon, whose reason says how they are fused and stored."""
    if layout.blocks > 1 and not fused:
        fused = f"{layout.blocks} fused blocks"
    stored = "stored (in, out)" if layout.transposed else ""
    said = ", ".join(filter(None, [reason, fused, stored]))
    return Role(name, "muon", said, layout, is_layer=is_layer, confidence=confidence)


def unknown(reason: str) -> Role:
    """Return the role of a parameter of which nothing says what it is: AdamW updates it, and a warning lists it."""
    return Role("other", "adamw", reason, confidence="guess")
