"""The role of parameters that a module of no known class owns, from what is beside them and from their names."""

import math
import re
from dataclasses import replace

from torch import Tensor

from lightning_muon.optim.routing.declared import (
    by_head_layout,
    declared_layout,
    has_bias_of_its_shape,
    layout_by_bias,
)
from lightning_muon.optim.routing.experts import expert_role
from lightning_muon.optim.routing.fused_weights import fused_layout
from lightning_muon.optim.routing.heads import OUTPUT_PROJECTIONS, heads_of
from lightning_muon.optim.routing.layers import linear_role
from lightning_muon.optim.routing.place import Place
from lightning_muon.optim.routing.roles import Confidence, Role, matrices, unknown, vector
from lightning_muon.optim.update.matrix_layout import MatrixLayout

_EMBEDDING_CLASS = re.compile(r"(Embeddings?(Bag)?|Embedder|Tokenizer)$")
_NORM_CLASS = re.compile(r"Norm(\dd)?$")
_LAYER_CLASS = re.compile(r"(Linear|Dense|Conv(\dd)?)$")

# What is added to each element or multiplied with it, by one word of the name: LayerScale (CaiT, arXiv:2103.17239),
# scale_shift_table (PixArt, arXiv:2310.00426), modulation (Wan, arXiv:2503.20314), skip_weights and lambdas
# (https://github.com/KellerJordan/modded-nanogpt), r_w_bias (XLNet, arXiv:1906.08237). Position biases are among them:
# the code of Swin (relative_position_bias_table) and of LeViT (attention_biases) excludes them from weight decay.
_ELEMENTWISE = frozenset(
    {"bias", "biases", "scale", "scales", "shift", "shifts", "gain", "gains", "gamma", "beta", "alpha", "sigma", "std"}
    | {"logvar", "temperature", "tau", "lambda", "lambdas", "lamb", "skip", "layerscale", "scaler", "scalers"}
    | {"modulation", "modulate"}
)
# Decay and skip of a state space, step size, and the mixing of time steps in RWKV: the code of Mamba and of S4 marks
# them to have no decay, https://github.com/state-spaces/mamba/blob/main/mamba_ssm/modules/mamba_simple.py.
_STATE_SPACE = re.compile(
    r"^(A_logs?|log_A(_real|_imag)?|A_(re|im|real|imag)|inv_A_real|dt_bias|log_dt|inv_dt|Ds"
    r"|time_(mix|decay|first|maa|faaaa)(_[a-z]+)?)$"
)
# Rows that are looked up, or that stand for positions, tokens, queries and codes.
_TABLE = re.compile(
    r"embed|token|codebook|codevector|prototype|centroid|(^|_)emb(s|_|$)|(^|_)pos(ition|$|_)"
    r"|(^|_)rel(ative)?_(h|w|k|v|height|width)$|(^|_)(height|width)_rel$|(^|_)query$"
    r"|(^|_)(latents|queries|slots|prompts?|probe|registers?)(_|$)",
    re.IGNORECASE,
)
# Vectors of attention in graphs: torch-geometric's att, att_src, att_l and others.
_ATTENTION_VECTOR = re.compile(r"^att(n|ention)?(_(src|dst|edge|l|r|i|j|msg))?$")
# A row for each class in a loss: ArcFace, CosFace and others (https://github.com/deepinsight/insightface), the proxies
# of https://github.com/KevinMusgrave/pytorch-metric-learning.
_LOSS_CLASS = re.compile(r"Loss$|Criterion$|Margin|(Arc|Cos|Sphere|Mag|Ada|Curricular)Face|Proxy")
_LOSS_PATH = re.compile(r"(^|_)(loss|criterion|arcface|cosface)(_|$)", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
# One of these words is in the name of a matrix; a mask or a score of each weight has its shape, and is none.
_MATRIX_WORD = re.compile(r"weight|kernel|proj|matrix|root|lin(ear)?$|^[a-zA-Z]\d?$|(^|_)w\d*$", re.IGNORECASE)
_NO_MATRIX_WORD = re.compile(r"(^|_)(masks?|scores?|noise|class|loss|task|sample|importance)(_|$)", re.IGNORECASE)
_PROJECTION = re.compile(r"(^|_)(q|k|v|o|qkv|kv|in|out|up|down|gate|gate_up|query|key|value)_proj$|^(to_)?(qkv|kv)$")


def free_role(place: Place) -> Role:
    """Return the role of a parameter that the class of its owner does not tell."""
    place = place.in_list()
    return _by_name(place) or _by_structure(place) or _by_usual_name(place) or _not_known(place)


def _by_name(place: Place) -> Role | None:
    """Return the role of what is no matrix whatever its shape: scales and biases, tables, norms, losses."""
    name, kind = place.name, place.kind
    if _is_of_state_space(place):
        return vector("vectors of a state space", "by name")
    words = re.split(r"_|(?<=[a-z])(?=[A-Z])|(?<=[a-z])(?=\d)", name)
    if not _ELEMENTWISE.isdisjoint(word.lower() for word in words):
        return vector("bias, scale or shift, by its name", "by name")
    may_be_matrix = name == "query" and _is_square(place.parameter)
    is_projection = may_be_matrix or name.endswith(("proj", "projection", "_weight"))
    if _TABLE.search(name) and not is_projection:
        return Role("embedding", "adamw", "embedding, by its name", confidence="by name")
    if _EMBEDDING_CLASS.search(kind):
        return Role("embedding", "adamw", "embedding", is_embedding=True, confidence="by name")
    if _NORM_CLASS.search(kind):
        return vector(f"scale or shift of {kind}", "by name")
    if _ATTENTION_VECTOR.search(name):
        return vector("vectors of attention, by their name", "by name")
    if _LOSS_CLASS.search(kind) or any(_LOSS_PATH.search(own) for own in place.names[:1]):
        return Role("head", "adamw", f"rows of the classes in {kind}", confidence="by name")
    return None


def _is_of_state_space(place: Place) -> bool:
    return bool(_STATE_SPACE.search(place.name)) or (place.name == "D" and hasattr(place.owner, "A_log"))


def _by_structure(place: Place) -> Role | None:
    """Return the role that the owner's numbers or the parameters beside it tell."""
    if (experts := expert_role(place)) is not None:
        return experts
    if has_bias_of_its_shape(place):
        return vector(f"elementwise weight of {place.kind}: its bias has the same shape")
    heads = heads_of([place.owner])
    if place.parameter.ndim == 3 and heads and tuple(place.parameter.shape[:2]) == (1, heads.queries):
        return vector(f"a vector for each of {heads.queries} heads")
    if _MATRIX_WORD.search(name := place.name) and not _NO_MATRIX_WORD.search(name):
        layout = declared_layout(place) or layout_by_bias(place)
        if layout is not None:
            return _matrix(place, layout, "known")
    if place.parameter.ndim == 3 and (layout := by_head_layout(place, sorted(OUTPUT_PROJECTIONS))):
        return matrices(layout, f"hidden matrix of {place.kind}, with its heads apart")
    return None


def _by_usual_name(place: Place) -> Role | None:
    """Return the role of a matrix whose name, or whose owner's class, is that of a layer: stored (out, in)."""
    if place.parameter.ndim != 2:
        return _convolution(place)
    layout, said = fused_layout(place.stem, place.owner, *place.parameter.shape)
    is_projection = bool(_PROJECTION.search(place.stem)) or layout != MatrixLayout() or bool(said)
    if is_projection and (place.name.endswith("_weight") or _is_square(place.parameter) or layout != MatrixLayout()):
        return matrices(layout, f"hidden matrix of {place.kind}", said, confidence="by name")
    is_weight = place.name == "weight" or (re.fullmatch(r"weight\d|W", place.name) and _is_square(place.parameter))
    return _matrix(place, MatrixLayout(), "by name") if is_weight and _LAYER_CLASS.search(place.kind) else None


def _convolution(place: Place) -> Role | None:
    """Return the role of the weight of a class that is named after a convolution, (out, in, kernel…)."""
    dimensions = re.search(r"Conv(\d)d$", place.kind)
    shape = place.parameter.shape
    if not _CONVOLUTION.search(place.kind) or place.name != "weight" or place.parameter.ndim < 3:
        return None
    if shape[1] == 1 < shape[0]:
        return Role("other", "adamw", "depthwise convolution, by its name: filters", confidence="by name")
    if dimensions and len(shape) == 2 + int(dimensions[1]):
        return _matrix(place, MatrixLayout(), "by name")
    return None


def _matrix(place: Place, layout: MatrixLayout, confidence: Confidence) -> Role:
    shape = place.parameter.shape
    if layout.stacked:
        return matrices(layout, f"stack of matrices of {place.kind}", confidence=confidence)
    if place.parameter.ndim > 2:
        return replace(matrices(layout, f"convolution of {place.kind}", confidence=confidence), is_layer=True)
    if place.name == "weight":
        role = linear_role(place, layout)
        return replace(role, confidence=confidence if role.confidence == "known" else role.confidence)
    fused, said = fused_layout(place.stem, place.owner, *layout.fans(shape)[0])
    layout = replace(fused, transposed=layout.transposed)
    return matrices(layout, f"hidden matrix of {place.kind}", said, confidence=confidence)


def _is_square(parameter: Tensor) -> bool:
    return math.prod(parameter.shape) == max(parameter.shape) ** 2


def _not_known(place: Place) -> Role:
    return unknown(f"{place.parameter.ndim}-D parameter of {place.kind}, of unknown role")
