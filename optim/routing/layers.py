"""The role of the weights of layers, which their class tells."""

import re
from dataclasses import replace

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_muon.optim.routing.declared import declared_layout, layout_by_bias
from lightning_muon.optim.routing.experts import ROUTER, is_router
from lightning_muon.optim.routing.fused_weights import Fused, fused
from lightning_muon.optim.routing.place import Place, is_vector
from lightning_muon.optim.routing.roles import Role, matrices, vector
from lightning_muon.optim.update.matrix_layout import MatrixLayout

_GATES = {"RNN": 1, "RNNCell": 1, "LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
# A layer over one-hot positions is a table: LayoutLMv2's and LayoutLMv3's rel_pos_bias.
_POSITION_BIAS = re.compile(r"(^|_)(rel|relative)_pos(ition)?(_\w+)?_bias$")
_LAYER_CLASS = re.compile(r"(Linear|Dense)$")


def layer_role(place: Place) -> Role | None:
    """Return the role of a weight that the class of its owner tells, ``None`` for other parameters."""
    owner = place.owner
    if place.name == "weight" and isinstance(owner, _ConvNd):
        return _convolution(place, owner)
    if place.name == "weight" and place.parameter.ndim == 2 and not isinstance(owner, nn.Bilinear):
        if isinstance(owner, nn.Linear) or place.kind == "Conv1D":  # Conv1D of transformers.pytorch_utils
            return linear_role(place, MatrixLayout(transposed=place.kind == "Conv1D"))
        if _LAYER_CLASS.search(place.kind):
            layout = declared_layout(place) or layout_by_bias(place)
            role = linear_role(place, layout or MatrixLayout())
            return role if layout else replace(role, confidence="by name")
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return Role("embedding", "adamw", "embedding", is_embedding=True)
    if is_vector(place.parameter):
        return vector()
    if isinstance(owner, nn.MultiheadAttention):
        return matrices(MatrixLayout(blocks=3 if place.name == "in_proj_weight" else 1), "attention projection")
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        kind = getattr(owner, "mode", place.kind).split("_")[0]
        gates = 1 if place.name.startswith("weight_hr") else _GATES.get(kind, 1)
        return matrices(MatrixLayout(blocks=gates), f"recurrent matrix of {place.kind}")
    if isinstance(owner, nn.Bilinear):
        return Role("other", "adamw", "bilinear form, not a matrix")
    return None


def linear_role(place: Place, layout: MatrixLayout) -> Role:
    """Return the role of the weight of a linear layer, (out, in) or, if the layout is transposed, (in, out)."""
    fan_out, fan_in = layout.fans(place.parameter.shape)[0]
    if is_router(place):
        return matrices(layout, ROUTER, name="router")
    if place.names and _POSITION_BIAS.search(place.names[0]):
        said = "embedding, biases by relative position, by its name"
        return Role("embedding", "adamw", said, confidence="by name")
    if min(fan_out, fan_in) == 1:
        return _one_row(fan_out)
    return _fused_role("hidden matrix", layout, fused(place, fan_out, fan_in))


def _convolution(place: Place, owner: _ConvNd) -> Role:
    is_transposed = isinstance(owner, _ConvTransposeNd)
    one_filter_each = owner.groups in {owner.in_channels, owner.out_channels}
    if owner.groups > 1 and (is_transposed or one_filter_each):
        return Role("other", "adamw", "depthwise or transposed grouped convolution: filters, no matrix")
    layout = MatrixLayout(blocks=owner.groups, transposed=is_transposed)
    reason = "transposed convolution as (in, out·kernel)" if is_transposed else "convolution as (out, in·kernel)"
    if owner.groups > 1:
        return Role("matrix", "muon", f"{reason}, {owner.groups} groups", layout, is_layer=True)
    fan_out, fan_in = layout.fans(place.parameter.shape)[0]
    if min(fan_out, fan_in) == 1:
        return _one_row(fan_out)
    if is_transposed:
        return Role("matrix", "muon", reason, layout, is_layer=True)
    return _fused_role(reason, layout, fused(place, owner.out_channels, owner.in_channels))


def _fused_role(reason: str, layout: MatrixLayout, blocks: Fused | None) -> Role:
    if blocks is None:
        return matrices(layout, reason, is_layer=True)
    layout = replace(blocks.layout, transposed=layout.transposed)
    return matrices(layout, reason, blocks.said, confidence=blocks.confidence)


def _one_row(fan_out: int) -> Role:
    """Return the role of a layer with one output or one input, such as a gate.

    The polar factor of a row is the row over its norm: of what Muon does for a matrix, nothing is left.
    """
    said = "one output" if fan_out == 1 else "one input"
    return replace(vector(f"vector: the layer has {said}"), is_layer=True)
