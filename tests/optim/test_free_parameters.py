"""Parameters that a module of no known class owns: told by what is beside them, by usual names, or not at all."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MatrixLayout, find_routes
from lightning_muon.optim.routing.routing import Route


def module(kind: str = "Mixer", said: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> nn.Module:
    """Return a module of a class of this name, with attributes, and parameters of these shapes."""
    built = type(kind, (nn.Module,), {})()
    for name, value in (said or {}).items():
        setattr(built, name, value)
    for name, shape in shapes.items():
        setattr(built, name, nn.Parameter(torch.zeros(shape)))
    return built


def routes(owner: nn.Module) -> dict[str, Route]:
    """Return the routes of the parameters of a module that is neither the first nor the last of a model."""
    model = nn.ModuleDict({"first": nn.Linear(5, 7), "part": owner, "head": nn.Linear(5, 3)})
    return {r.name.removeprefix("part."): r for r in find_routes(model) if r.name.startswith("part.")}


def route(owner: nn.Module) -> Route:
    return next(iter(routes(owner).values()))


@pytest.mark.parametrize(
    ("kind", "said", "shapes"),
    [
        ("Mixer", {}, {"weight": (6, 4)}),
        ("Mixer", {}, {"kernel": (6, 4)}),
        ("Mixer", {}, {"proj": (6, 4)}),
        ("Mixer", {}, {"class_weight": (6, 4)}),
        ("Mixer", {"in_features": 4, "out_features": 6}, {"mask_scores": (6, 4)}),  # movement pruning
        ("Mixer", {"in_features": 4, "out_features": 6}, {"weight": (6, 5)}),
        ("SplineLinear", {"in_features": 4, "out_features": 6}, {"spline_weight": (6, 4, 8)}),
        ("GraphConv", {}, {"weight": (3, 8, 8)}),
        ("Mixer", {}, {"query": (8, 8)}),
        ("Mixer", {}, {"prompts_projection": (6, 4)}),
        ("Mixer", {}, {"q_proj": (6, 4)}),  # stored (out, in) or (in, out)
    ],
)
def test_what_nothing_tells_is_a_guess_that_is_announced(
    kind: str, said: dict[str, int], shapes: dict[str, tuple[int, ...]]
) -> None:
    (name,) = shapes
    with pytest.warns(UserWarning, match=rf"part.{name} {re.escape(str(shapes[name]))}"):
        found = route(module(kind, said, **shapes))
    assert (found.algorithm, found.role, found.confidence) == ("adamw", "other", "guess")


TOLD: list[tuple[str, dict[str, int], dict[str, tuple[int, ...]], MatrixLayout]] = [
    ("Mixer", {"in_features": 4, "out_features": 6}, {"weight": (6, 4)}, MatrixLayout()),
    ("Mixer", {"in_features": 4, "out_features": 6}, {"weight": (4, 6)}, MatrixLayout(transposed=True)),
    ("RGCNConv", {"in_channels": 4, "out_channels": 6}, {"root": (4, 6)}, MatrixLayout(transposed=True)),
    (
        "RGCNConv",
        {"in_channels": 4, "out_channels": 6, "num_relations": 3},
        {"weight": (3, 4, 6)},
        MatrixLayout(stacked=True, transposed=True),
    ),
    ("RGATConv", {"in_channels": 4, "out_channels": 3, "heads": 2}, {"weight": (5, 4, 6)}, MatrixLayout(True, 1, True)),
    ("HeteroLinear", {"in_channels": 4, "out_channels": 6}, {"weight": (3, 4, 6)}, MatrixLayout(True, 1, True)),
    ("ModulatedConv2d", {"in_channels": 4, "out_channels": 6}, {"weight": (6, 4, 3, 3)}, MatrixLayout()),
    ("ModulatedConv2d", {"in_channel": 4, "in_channels": 4, "out_channels": 6}, {"weight": (1, 6, 4, 3, 3)},
     MatrixLayout(stacked=True)),
    ("NoisyLinear", {"in_features": 4, "out_features": 6}, {"weight_mu": (6, 4)}, MatrixLayout()),
    ("Mixer", {}, {"weight": (6, 4), "bias": (6,)}, MatrixLayout()),
    ("Mixer", {}, {"kernel": (4, 6), "bias": (6,)}, MatrixLayout(transposed=True)),
    ("Gates", {}, {"gate_weight": (4, 8, 8), "gate_bias": (4, 8)}, MatrixLayout(stacked=True)),
    ("Mixer", {"n_head": 2, "d_head": 4}, {"q": (6, 2, 4)}, MatrixLayout(transposed=True)),  # XLNet
    ("Mixer", {"n_head": 2, "d_head": 4}, {"o": (6, 2, 4)}, MatrixLayout()),
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kind", "said", "shapes", "layout"), TOLD)
def test_a_matrix_is_told_by_declared_widths_or_by_a_bias(
    kind: str, said: dict[str, int], shapes: dict[str, tuple[int, ...]], layout: MatrixLayout
) -> None:
    found = route(module(kind, said, **shapes))
    assert (found.algorithm, found.role, found.confidence) == ("muon", "matrix", "known")
    assert found.layout == layout


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("EqualLinear", "weight", (6, 4)),
        ("FlippedDense", "weight", (6, 4)),
        ("CrossAttention", "q_proj_weight", (6, 4)),
        ("CrossAttention", "qkv_weight", (12, 4)),
        ("CrossAttention", "k_proj", (4, 4)),
        ("AntiSymmetricConv", "W", (4, 4)),
        ("MotionConv2d", "weight", (6, 4, 3, 3)),
    ],
)
def test_a_matrix_is_told_by_a_usual_name(kind: str, name: str, shape: tuple[int, ...]) -> None:
    found = route(module(kind, **{name: shape}))
    assert (found.algorithm, found.confidence) == ("muon", "by name")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "said", "shapes"),
    [
        ("MambaMixer", {}, {"A_log": (8, 4)}),
        ("ZambaMixer", {}, {"D": (2, 8), "A_log": (2, 8, 4)}),
        ("Attention", {}, {"attention_biases": (4, 49)}),
        ("Attention", {}, {"relative_position_bias_table": (49, 4)}),
        ("Attention", {}, {"r_w_bias": (4, 8)}),
        ("Block", {}, {"scale_shift_table": (6, 8)}),
        ("Block", {}, {"modulation": (1, 6, 8)}),
        ("Block", {}, {"layer_scale_1": (8, 1, 1)}),
        ("Block", {}, {"layerScale": (2, 8)}),
        ("NoisyLinear", {"in_features": 4, "out_features": 6}, {"sigma_weight": (6, 4)}),
        ("Model", {}, {"skip_weights": (3, 8)}),
        ("Model", {}, {"resid_lambdas": (3, 2)}),
        ("Attention", {}, {"temperature": (4, 1, 1)}),
        ("GATConv", {}, {"att_src": (1, 4, 8)}),
        ("HANConv", {"heads": 4}, {"lin_src": (1, 4, 8)}),
        ("RwkvAttention", {}, {"time_faaaa": (4, 8)}),
        ("Experts", {}, {"gate_up_proj_bias": (4, 8)}),
        ("ChannelNorm", {}, {"weight": (8, 2)}),
        ("Affine", {}, {"weight": (6, 4), "bias": (6, 4)}),  # both act on each element
        ("Embeddings", {}, {"cls_token": (1, 1, 8)}),
    ],
)
def test_vectors_of_any_shape_do_not_decay(kind: str, said: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    found = route(module(kind, said, **shapes))
    assert (found.algorithm, found.role, found.options) == ("adamw", "vector", {"weight_decay": 0.0})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("Attention", "rel_pos_h", (13, 8)),
        ("PosEmbedRel", "height_rel", (13, 8)),
        ("Attention", "emb_rel_k", (1, 9, 8)),
        ("Decoder", "query_tokens", (1, 32, 8)),
        ("Resampler", "latents", (16, 8)),
        ("Projector", "query", (16, 8)),
        ("Quantizer", "codevectors", (1, 16, 8)),
        ("Attention", "adaption_prompt", (1, 4, 8)),
        ("NumericalFeatureTokenizer", "weight", (5, 8)),
        ("LinearEmbeddings", "weight", (5, 8)),
    ],
)
def test_tables_are_embeddings(kind: str, name: str, shape: tuple[int, ...]) -> None:
    found = route(module(kind, **{name: shape}))
    assert (found.algorithm, found.role, found.confidence) == ("adamw", "embedding", "by name")


@pytest.mark.filterwarnings("error")
def test_filters_of_a_depthwise_convolution_that_is_no_layer_of_torch() -> None:
    found = route(module("ShortConvolution", weight=(8, 1, 4)))
    assert (found.algorithm, found.role, found.confidence) == ("adamw", "other", "by name")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "name"), [("ArcMarginProduct", "weight"), ("ArcFaceLoss", "W"), ("ProxyAnchorLoss", "proxies")]
)
def test_the_classes_of_a_loss_are_an_output_head(kind: str, name: str) -> None:
    """Also where it declares its widths, as a linear layer does."""
    found = route(module(kind, {"in_features": 4, "out_features": 6}, **{name: (6, 4)}))
    assert (found.algorithm, found.role, found.options) == ("adamw", "head", {})


def test_lists_of_parameters_are_judged_by_their_owner() -> None:
    positions = module("AxialPositionEmbeddings")
    positions.weights = nn.ParameterList([torch.zeros(8, 1, 4), torch.zeros(1, 8, 4)])
    attention = module("HANConv", {"heads": 4})
    attention.lin_src = nn.ParameterDict({"a__to__b": torch.zeros(1, 4, 8)})
    mixer = module("MambaMixer")
    mixer.A_logs = nn.ParameterList([torch.zeros(8, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {found.role for found in routes(positions).values()} == {"embedding"}
        assert route(attention).reason == "a vector for each of 4 heads"
        assert route(mixer).role == "vector"


@pytest.mark.parametrize("transposed", [False, True])
def test_stored_in_out_is_told_from_out_in_by_the_forward(transposed: bool) -> None:
    """The declared widths say which dimension is the output: the scale of Muon's update depends on it."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 6
            self.weight = nn.Parameter(torch.zeros(4, 6) if transposed else torch.zeros(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight if transposed else self.weight.mT)

    found = route(Mixer())
    assert found.layout.fans(found.shape) == [(6, 4)]
