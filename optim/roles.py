"""What part a parameter plays in its module, and so which algorithm fits it."""

import math
import re
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.parameter_group import Algorithm

# Projections that are commonly fused, by the name of the module, and how many equal blocks they hold.
_FUSED_BLOCKS = {"qkv": 3, "qkv_proj": 3, "wqkv": 3, "c_attn": 3, "kv": 2, "kv_proj": 2, "gate_up_proj": 2}
_GATES = {"RNN": 1, "RNNCell": 1, "LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
_TABLE_NAME = re.compile(r"embed|token|(^|_)pos(ition|$|_)", re.IGNORECASE)
_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)


@dataclass(frozen=True)
class Role:
    """Say which algorithm updates a parameter, where its matrices are, and why.

    Args:
        algorithm: ``"muon"`` or ``"adamw"``.
        reason: One line for people.
        layout: Where the matrices are; of no meaning for adamw.
        is_embedding: Whether this is the table of an embedding, to which a head may be tied.
        is_layer: Whether this is the weight of a linear or convolutional layer, which may be the model's output head.
        decay: Whether weight decay makes sense; not for vectors, whose size is their meaning.
        known: False if nothing but caution speaks for the choice.
    """

    algorithm: Algorithm
    reason: str
    layout: MatrixLayout = field(default_factory=MatrixLayout)
    is_embedding: bool = False
    is_layer: bool = False
    decay: bool = True
    known: bool = True


def role_of(owner: nn.Module, path: str, name: str, parameter: Tensor) -> Role:
    """Tell the role of a parameter from the module that owns it.

    Args:
        owner: The module that holds the parameter.
        path: The owner's name in the model, such as ``"blocks.3.attention"``.
        name: The parameter's name in its owner, such as ``"weight"``.
        parameter: The parameter itself.
    """
    kind = type(owner).__name__
    if parameter.ndim < 2:
        return Role("adamw", "vector", decay=False)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or "Embedding" in kind:
        return Role("adamw", "embedding", is_embedding=True)
    if "Norm" in kind:
        return Role("adamw", f"scale or shift of {kind}", decay=False)
    if isinstance(owner, nn.MultiheadAttention):
        return _attention(name)
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        gates = 1 if name.startswith("weight_hr") else _GATES.get(getattr(owner, "mode", kind).split("_")[0], 1)
        return _matrices(MatrixLayout(blocks=gates), f"recurrent matrix of {kind}", is_layer=False)
    if isinstance(owner, _ConvNd):
        return _convolution(owner)
    if isinstance(owner, nn.Bilinear):
        return Role("adamw", "bilinear form, not a matrix")
    if parameter.ndim == 2 and kind == "Conv1D":  # transformers.pytorch_utils.Conv1D stores (in, out)
        return _linear(path, parameter, transposed=True)
    if parameter.ndim == 2 and (isinstance(owner, nn.Linear) or kind.endswith(("Linear", "Dense"))):
        return _linear(path, parameter, transposed=False)
    return _free_parameter(kind, path, name, parameter)


def _attention(name: str) -> Role:
    if name == "in_proj_weight":
        return Role("muon", "query, key and value projections, 3 fused blocks", MatrixLayout(blocks=3))
    if name.endswith("proj_weight"):
        return Role("muon", "attention projection")
    return Role("adamw", "vector", decay=False)  # bias_k and bias_v, of shape (1, 1, width)


def _convolution(owner: _ConvNd) -> Role:
    if owner.groups > 1 and (isinstance(owner, _ConvTransposeNd) or owner.groups == owner.in_channels):
        return Role("adamw", "depthwise or transposed grouped convolution: filters, no matrix")
    layout = MatrixLayout(blocks=owner.groups, transposed=isinstance(owner, _ConvTransposeNd))
    reason = "transposed convolution as (in, out·kernel)" if layout.transposed else "convolution as (out, in·kernel)"
    if owner.groups > 1:
        reason += f", {owner.groups} groups"
    return Role("muon", reason, layout, is_layer=True)


def _linear(path: str, weight: Tensor, *, transposed: bool) -> Role:
    layout = MatrixLayout(transposed=transposed)
    fan_out, fan_in = layout.fans(weight.shape)
    blocks = _FUSED_BLOCKS.get(path.rpartition(".")[2].lower(), 1)
    # Grouped-query attention makes the blocks unequal: then the whole is taken as one matrix.
    if blocks > 1 and fan_out % blocks == 0 and (blocks == 2 or fan_out == blocks * fan_in):
        layout = MatrixLayout(transposed=transposed, blocks=blocks)
    return _matrices(layout, "hidden matrix", is_layer=layout.blocks == 1)


def _matrices(layout: MatrixLayout, reason: str, *, is_layer: bool) -> Role:
    if layout.blocks > 1:
        reason += f", {layout.blocks} fused blocks"
    if layout.transposed:
        reason += ", stored (in, out)"
    return Role("muon", reason, layout, is_layer=is_layer)


def _free_parameter(kind: str, path: str, name: str, parameter: Tensor) -> Role:
    """Judge a parameter that some module of the user's own holds directly."""
    if math.prod(parameter.shape) == max(parameter.shape):
        return Role("adamw", "vector", decay=False)
    if _TABLE_NAME.search(name):
        return Role("adamw", "embedding, by its name")
    if parameter.ndim == 3 and _EXPERT_NAME.search(f"{kind}.{path}.{name}"):
        blocks = _FUSED_BLOCKS.get(name.lower(), 1)
        blocks = blocks if parameter.shape[1] % blocks == 0 else 1
        reason = "experts, a matrix each" + (f", {blocks} fused blocks" if blocks > 1 else "")
        return Role("muon", reason, MatrixLayout(stacked=True, blocks=blocks))
    if parameter.ndim == 2 and name.endswith(("weight", "kernel", "proj")):
        return Role("muon", f"hidden matrix of {kind}")
    return Role("adamw", f"{parameter.ndim}-D parameter of {kind}, of unknown role", known=False)
