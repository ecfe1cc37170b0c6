"""The role of a parameter in its module, and the algorithm that fits it."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_muon.optim.routing.fused_weights import expert_layout, fused_layout
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.optim.update.options import Algorithm

RoleName = Literal["matrix", "router", "embedding", "head", "vector", "other"]
"""What a parameter is in its model: each role has groups of its own, and may have a learning rate of its own.

- ``matrix``: hidden matrices, in layers, convolutions, recurrent layers, stacks of experts; Muon's.
- ``router``: the matrices by which tokens choose their experts; Muon's.
- ``embedding``: tables, also of positions.
- ``head``: output layers. A weight that is tied to an embedding is a head: each step moves all of its rows.
- ``vector``: biases, scales and shifts, whatever their shape.
- ``other``: what only AdamW fits: bilinear forms, filters of depthwise convolutions, parameters of unknown role.
"""
ROLES: tuple[RoleName, ...] = get_args(RoleName)
Confidence = Literal["known", "by name", "guess"]
"""How sure a role is: by the class of its module or the structure of the model; by a name that is usual; or a guess."""
MUON_ROLES = frozenset[RoleName]({"matrix", "router"})
"""The roles that Muon updates unless a rule says otherwise; AdamW updates the others."""

_GATES = {"RNN": 1, "RNNCell": 1, "LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
_EMBEDDING_CLASS = re.compile(r"Embeddings?(Bag)?$")
_NORM_CLASS = re.compile(r"Norm(\dd)?$")
_TABLE_NAME = re.compile(r"embed|token|(^|_)pos(ition|$|_)", re.IGNORECASE)
_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"(Router|Gate)$")
# A hidden matrix like others: the runs of Muon at scale on mixtures of experts excluded only the embedding, the head
# and vectors: Liu et al. (2025), arXiv:2502.16982, and its code,
# https://github.com/MoonshotAI/Moonlight/blob/master/examples/toy_train.py
_ROUTER = "hidden matrix, router of experts"


@dataclass(frozen=True)
class Role:
    """The role of a parameter, its algorithm, where its matrices are, and why.

    Args:
        name: The role.
        algorithm: ``"muon"`` or ``"adamw"``.
        reason: One line for the routing table.
        layout: Where the matrices are; without meaning for adamw.
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


def role_of(owner: nn.Module, path: str, name: str, parameter: Tensor, parent: nn.Module | None = None) -> Role:
    """Find the role of a parameter from the module that owns it.

    A parameter with the attribute ``_no_weight_decay``, as Mamba's modules set it, gets no weight decay.

    Args:
        owner: The module that owns the parameter.
        path: The owner's name in the model without wrappers, such as ``"blocks.3.attention"``.
        name: The parameter's name in its owner, such as ``"weight"``.
        parameter: The parameter.
        parent: The module around the owner; its other children show how a weight is fused.
    """
    role = _role(owner, path, name, parameter, parent)
    if role.decay and getattr(parameter, "_no_weight_decay", False):
        return replace(role, reason=f"{role.reason}, marked to have no decay", decay=False, confidence="known")
    return role


def _role(owner: nn.Module, path: str, name: str, parameter: Tensor, parent: nn.Module | None) -> Role:
    kind = type(owner).__name__
    if parameter.ndim < 2:
        return Role("vector", "adamw", "vector", decay=False)
    if name == "weight" and (layer := _layer(owner, path, parameter, parent)):
        return layer
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or _EMBEDDING_CLASS.search(kind):
        return Role("embedding", "adamw", "embedding", is_embedding=True)
    if math.prod(parameter.shape) == max(parameter.shape):  # also the magnitudes (out, 1) of weight_norm
        return Role("vector", "adamw", "vector", decay=False)
    if _NORM_CLASS.search(kind):
        return Role("vector", "adamw", f"scale or shift of {kind}", decay=False)
    if isinstance(owner, nn.MultiheadAttention):
        blocks = 3 if name == "in_proj_weight" else 1
        return _matrices(MatrixLayout(blocks=blocks), "attention projection")
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        gates = 1 if name.startswith("weight_hr") else _GATES.get(getattr(owner, "mode", kind).split("_")[0], 1)
        return _matrices(MatrixLayout(blocks=gates), f"recurrent matrix of {kind}")
    if isinstance(owner, nn.Bilinear):
        return Role("other", "adamw", "bilinear form, not a matrix")
    return _free_parameter(owner, path, name, parameter)


def _layer(owner: nn.Module, path: str, weight: Tensor, parent: nn.Module | None) -> Role | None:
    """Return the role of the weight of a linear or convolutional layer, ``None`` for other modules."""
    kind = type(owner).__name__
    if isinstance(owner, _ConvNd):
        return _convolution(owner)
    if weight.ndim != 2 or isinstance(owner, nn.Bilinear):
        return None
    transposed = kind == "Conv1D"  # transformers.pytorch_utils.Conv1D stores (in, out)
    if not transposed and not isinstance(owner, nn.Linear) and not kind.endswith(("Linear", "Dense")):
        return None
    own_name = path.rpartition(".")[2]
    fan_out, fan_in = MatrixLayout(transposed=transposed).fans(weight.shape)[0]
    layout, fused = fused_layout(own_name, parent, fan_out, fan_in)
    routes_experts = own_name == "router" or (own_name == "gate" and hasattr(parent, "experts"))
    layout = replace(layout, transposed=transposed)
    if routes_experts:
        return _matrices(layout, _ROUTER, fused, name="router")
    is_layer = layout == MatrixLayout(transposed=transposed) and not fused
    return _matrices(layout, "hidden matrix", fused, is_layer=is_layer)


def _convolution(owner: _ConvNd) -> Role:
    if owner.groups > 1 and (isinstance(owner, _ConvTransposeNd) or owner.groups == owner.in_channels):
        return Role("other", "adamw", "depthwise or transposed grouped convolution: filters, no matrix")
    layout = MatrixLayout(blocks=owner.groups, transposed=isinstance(owner, _ConvTransposeNd))
    reason = "transposed convolution as (in, out·kernel)" if layout.transposed else "convolution as (out, in·kernel)"
    if owner.groups > 1:
        reason += f", {owner.groups} groups"
    return Role("matrix", "muon", reason, layout, is_layer=True)


def _matrices(
    layout: MatrixLayout, reason: str, fused: str = "", *, is_layer: bool = False, name: RoleName = "matrix"
) -> Role:
    if layout.blocks > 1 and not fused:
        fused = f"{layout.blocks} fused blocks"
    stored = "stored (in, out)" if layout.transposed else ""
    return Role(name, "muon", ", ".join(filter(None, [reason, fused, stored])), layout, is_layer=is_layer)


def _free_parameter(owner: nn.Module, path: str, name: str, parameter: Tensor) -> Role:
    """Find the role of a parameter that a module of another kind owns directly."""
    kind = type(owner).__name__
    if _TABLE_NAME.search(name):
        return Role("embedding", "adamw", "embedding, by its name")
    if _EXPERT_NAME.search(f"{kind}.{path}.{name}"):
        if name.endswith("bias"):
            return Role("vector", "adamw", "vectors, one an expert", decay=False)
        if parameter.ndim == 3:
            return _experts(owner, name, parameter)
    if parameter.ndim == 2 and name.endswith(("weight", "kernel", "proj")):
        layout, fused = fused_layout(re.sub("_(weight|kernel)$", "", name), owner, *parameter.shape)
        if _ROUTER_CLASS.search(kind):
            return _matrices(layout, _ROUTER, fused, name="router")
        return _matrices(layout, f"hidden matrix of {kind}", fused)
    return Role("other", "adamw", f"{parameter.ndim}-D parameter of {kind}, of unknown role", confidence="guess")


def _experts(owner: nn.Module, name: str, weights: Tensor) -> Role:
    layout = expert_layout(owner, name, weights)
    if layout is None:
        return Role("other", "adamw", "experts, stored (out, in) or (in, out): not known", confidence="guess")
    alternating = layout.interleaved > 1
    return _matrices(layout, "experts, a matrix each", "gate and up, which alternate" if alternating else "")
