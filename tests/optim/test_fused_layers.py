"""Fused layers are cut as their forward reads them, by the numbers and the layers around; and routers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MatrixLayout, find_routes
from lightning_muon.optim.routing.routing import Route
from tests.optim.routed_models import Conv1D

WIDTH = 8


def module(children: dict[str, nn.Module], kind: str = "Attention", **said: Any) -> nn.Module:
    built = type(kind, (nn.Module,), {})()
    for name, value in {**said, **children}.items():
        setattr(built, name, value)
    return built


def routes(part: nn.Module) -> dict[str, Route]:
    model = nn.ModuleDict({"first": nn.Linear(5, 7), "part": part, "head": nn.Linear(5, 3)})
    return {r.name.removeprefix("part."): r for r in find_routes(model) if r.name.startswith("part.")}


def assert_cut(found: Route, parts: list[Tensor]) -> None:
    """Assert that the matrices of a route are the parts, of any order and shape."""
    matrices = [matrix for batch in found.layout.matrices(found.parameter.detach()) for matrix in batch]
    assert len(matrices) == len(parts)
    for part in parts:
        assert any(torch.equal(part, matrix) for matrix in matrices)


def test_convolutions_of_one_pixel() -> None:
    found = routes(module({"qkv": nn.Conv2d(WIDTH, 24, 1), "proj": nn.Conv2d(WIDTH, WIDTH, 1)}))["qkv.weight"]
    assert_cut(found, list(found.parameter.detach().flatten(1).split(8)))
    assert (found.reason, found.confidence) == ("convolution as (out, in·kernel), 3 fused blocks", "known")


@pytest.mark.parametrize("layer", [nn.Linear(WIDTH, 32), nn.Conv2d(WIDTH, 32, 1)])
def test_a_projection_in_a_wrapper_with_heads_apart(layer: nn.Module) -> None:
    """LeViT: qkv.linear; its forward views (heads, query + key + value), with values of twice the rows."""
    qkv = nn.ModuleDict({"linear": layer, "bn": nn.BatchNorm1d(32)})
    found = routes(module({"qkv": qkv}, num_heads=2, key_dim=4, val_dim=8))["qkv.linear.weight"]
    rows = found.parameter.detach().flatten(1).view(2, 16, WIDTH)
    assert_cut(found, [part.flatten(0, 1) for part in rows.split([4, 4, 8], dim=1)])


def test_a_projection_for_each_head() -> None:
    """EfficientViT."""
    layers = nn.ModuleList(nn.ModuleDict({"c": nn.Conv2d(WIDTH, 16, 1)}) for _ in range(2))
    found = routes(module({"qkvs": layers}, num_heads=2, key_dim=4, val_dim=8))["qkvs.1.c.weight"]
    assert_cut(found, list(found.parameter.detach().flatten(1).split([4, 4, 8])))


def test_heads_first() -> None:
    """MaxViT and CoAtNet of timm say so."""
    attention = module({"qkv": nn.Linear(WIDTH, 24), "proj": nn.Linear(8, 8)}, num_heads=2, head_first=True)
    found = routes(attention)["qkv.weight"]
    assert_cut(found, [part.flatten(0, 1) for part in found.parameter.detach().view(2, 3, 4, WIDTH).unbind(1)])


def test_a_key_that_is_also_the_value_is_whole() -> None:
    """DeepSeek-V4's."""
    said = {"num_heads": 4, "num_key_value_heads": 1, "head_dim": 4}
    assert routes(module({"kv_proj": nn.Linear(WIDTH, 4)}, **said))["kv_proj.weight"].layout == MatrixLayout()
    assert routes(module({"kv_proj": nn.Linear(WIDTH, 8)}, **said))["kv_proj.weight"].layout == MatrixLayout(blocks=2)


def test_keys_and_values_wider_than_the_queries_are_whole() -> None:
    """As of differential attention, which has two keys."""
    found = routes(module({"to_kv": nn.Linear(WIDTH, 24), "to_out": nn.Linear(8, WIDTH)}))["to_kv.weight"]
    assert found.layout == MatrixLayout()
    assert "left whole" in found.reason


def test_deberta() -> None:
    attention = module({"in_proj": nn.Linear(WIDTH, 24)}, "DisentangledSelfAttention", num_attention_heads=2)
    found = routes(attention)["in_proj.weight"]
    assert_cut(found, [part.flatten(0, 1) for part in found.parameter.detach().view(2, 3, 4, WIDTH).unbind(1)])


def mixer(in_proj: int, **parts: Any) -> nn.Module:
    layers = {"in_proj": nn.Linear(WIDTH, in_proj), "out_proj": nn.Linear(16, WIDTH)}
    return module({**layers, **parts}, "Mixer")


def test_mamba2() -> None:
    """Gate, input, B, C and step size, which the convolution and the decays tell."""
    mamba = mixer(2 * 16 + 2 * 6 + 4, conv1d=nn.Conv1d(28, 28, 4, groups=28), A_log=nn.Parameter(torch.zeros(4)))
    found = routes(mamba)["in_proj.weight"]
    assert_cut(found, list(found.parameter.detach().split([16, 16, 6, 6, 4])))
    assert "gate, input, B, C and step size, fused" in found.reason
    other = mixer(2 * 16 + 2 * 6 + 3, conv1d=nn.Conv1d(28, 28, 4, groups=28), A_log=nn.Parameter(torch.zeros(4)))
    assert routes(other)["in_proj.weight"].layout == MatrixLayout()


def test_mamba() -> None:
    layers = {"x_proj": nn.Linear(16, 2 + 2 * 3), "dt_proj": nn.Linear(2, 16)}
    found = routes(mixer(32, **layers, A_log=nn.Parameter(torch.zeros(16, 3))))
    assert found["in_proj.weight"].layout == MatrixLayout(blocks=2)
    assert_cut(found["x_proj.weight"], list(found["x_proj.weight"].parameter.detach().split([2, 3, 3])))


def test_zamba_alternates() -> None:
    found = routes(module({"in_proj": nn.Linear(8, 32), "out_proj": nn.Linear(16, 8)}, "ZambaMambaMixer"))
    assert_cut(found["in_proj.weight"], list(found["in_proj.weight"].parameter.detach().view(16, 2, 8).unbind(1)))


def test_gated_delta_net() -> None:
    """Qwen3-Next's, by key head, as its forward splits it; and the later one, whose parts follow one another."""
    said = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 3, "head_v_dim": 5}
    layers = {"in_proj_qkvz": nn.Linear(8, 52), "in_proj_ba": nn.Linear(8, 8), "in_proj_qkv": nn.Linear(8, 32)}
    found = {name: route for name, route in routes(module(layers, "DeltaNet", **said)).items() if "weight" in name}
    rows = {name.removesuffix(".weight"): route.parameter.detach() for name, route in found.items()}
    by_head = rows["in_proj_qkvz"].view(2, 2 * 3 + 2 * 2 * 5, 8).split([3, 3, 10, 10], dim=1)
    assert_cut(found["in_proj_qkvz.weight"], [part.flatten(0, 1) for part in by_head])
    by_head = rows["in_proj_ba"].view(2, 4, 8).split([2, 2], dim=1)
    assert_cut(found["in_proj_ba.weight"], [part.flatten(0, 1) for part in by_head])
    assert_cut(found["in_proj_qkv.weight"], list(rows["in_proj_qkv"].split([6, 6, 20])))


@pytest.mark.parametrize(
    ("layers", "halves"),
    [
        ({"fc1": nn.Linear(8, 32), "act": nn.GELU(), "fc2": nn.Linear(16, 8)}, 2),
        ({"fc1": Conv1D(32, 8), "fc2": Conv1D(8, 16)}, 2),
        ({"proj": nn.ModuleDict({"proj": nn.Linear(8, 32)}), "out": nn.Linear(16, 8)}, 2),  # GEGLU of diffusers
        ({"pw1": nn.Conv1d(8, 16, 1), "dw": nn.Conv1d(8, 8, 3, groups=8), "pw2": nn.Conv1d(8, 8, 1)}, 2),  # Conformer
        ({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)}, 1),
        ({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(16, 5)}, 1),
        ({"fc1": nn.Linear(8, 32), "mid": nn.Linear(8, 8), "fc2": nn.Linear(16, 8)}, 1),
        ({"lin": nn.Linear(8, 8), "lin_edge": nn.Linear(4, 8)}, 1),  # beside each other
    ],
)
def test_gated_linear_units_are_told_by_the_next_layer(layers: dict[str, nn.Module], halves: int) -> None:
    first = next(iter(routes(module(layers, "FeedForward")).values()))
    assert (first.algorithm, first.layout.blocks) == ("muon", halves)


def test_gate_and_up_of_experts_without_a_name() -> None:
    """JetMoE: two modules of experts beside each other, and the second takes half of what the first gives."""
    kind = type("ParallelExperts", (nn.Module,), {})

    def stack(outputs: int, inputs: int) -> nn.Module:
        built = kind()
        built.output_size, built.input_size = outputs, inputs
        built.weight = nn.Parameter(torch.zeros(4, outputs, inputs))
        return built

    found = routes(module({"input_linear": stack(32, 8), "output_linear": stack(8, 16)}, "MoE"))
    assert found["input_linear.weight"].layout == MatrixLayout(stacked=True, blocks=2)
    assert found["output_linear.weight"].layout == MatrixLayout(stacked=True)
    plain = routes(module({"input_linear": stack(16, 8), "output_linear": stack(8, 16)}, "MoE"))
    assert {route.layout for route in plain.values()} == {MatrixLayout(stacked=True)}


def test_square_experts_need_not_say_how_they_are_stored() -> None:
    experts = type("Experts", (nn.Module,), {})()
    experts.up = nn.Parameter(torch.zeros(4, 8, 8))
    assert routes(experts)["up"].layout == MatrixLayout(stacked=True)


@pytest.mark.parametrize(
    ("router", "name"),
    [
        (module({"classifier": nn.Linear(8, 4)}, "TopKRouter"), "router"),  # Switch Transformers, NLLB
        (module({"layer": nn.Linear(8, 4)}, "TopKGating"), "router"),  # JetMoE
        (module({"wg": nn.Linear(8, 4)}, "MoEGate"), "gate"),  # HunYuan
        (nn.Linear(8, 4), "router"),
        (nn.Linear(8, 4), "gate"),
    ],
)
def test_routers_are_no_heads(router: nn.Module, name: str) -> None:
    experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    layers = {name: router, "experts": experts, "shared_expert_gate": nn.Linear(8, 1)}
    found = {route.name: route for route in find_routes(module(layers, "MoE"))}
    (weight,) = [route for path, route in found.items() if path.startswith(f"{name}.") and "weight" in path]
    assert (weight.role, weight.algorithm) == ("router", "muon")


def test_a_gate_without_experts_is_a_layer() -> None:
    found = routes(module({"gate": module({"proj": nn.Linear(8, 4)}, "SpatialGate"), "up": nn.Linear(8, 4)}, "Mlp"))
    assert {route.role for route in found.values() if route.shape.numel() > 4} == {"matrix"}


def test_filters_of_a_convolution_with_one_output_a_group() -> None:
    found = routes(nn.Conv2d(8, 4, 3, groups=4))["weight"]
    assert (found.role, found.algorithm) == ("other", "adamw")


def test_heads_of_levit_in_transformers() -> None:
    said = {"key_dim": 4, "attention_ratio": 2, "num_attention_heads": 3}
    layers = {"queries_keys_values": module({"linear": nn.Linear(WIDTH, 48), "norm": nn.BatchNorm1d(48)})}
    found = routes(module({**layers, "projection": nn.Linear(24, WIDTH)}, **said))["queries_keys_values.linear.weight"]
    parts = found.parameter.detach().view(3, 16, WIDTH).split([4, 4, 8], dim=1)
    assert_cut(found, [part.flatten(0, 1) for part in parts])
    pair = {"keys_values": module({"linear": nn.Linear(WIDTH, 36), "norm": nn.BatchNorm1d(36)})}
    found = routes(module(pair, **said))["keys_values.linear.weight"]
    parts = found.parameter.detach().view(3, 12, WIDTH).split([4, 8], dim=1)
    assert_cut(found, [part.flatten(0, 1) for part in parts])


def test_a_projection_for_each_type_of_node() -> None:
    """As in the HGTConv of PyTorch-Geometric."""
    types = nn.ModuleDict({"author": nn.Linear(WIDTH, 24), "paper": nn.Linear(WIDTH, 24)})
    found = routes(module({"kqv_lin": module({"lins": types}, "HeteroDictLinear")}, "HGTConv"))
    for name in ("author", "paper"):
        route = found[f"kqv_lin.lins.{name}.weight"]
        assert_cut(route, list(route.parameter.detach().split(8)))


def test_a_layer_over_positions_is_a_table() -> None:
    found = routes(module({"rel_pos_x_bias": nn.Linear(64, 4, bias=False)}, "Encoder"))["rel_pos_x_bias.weight"]
    assert (found.role, found.algorithm, found.confidence) == ("embedding", "adamw", "by name")


def test_the_last_matrices_are_a_guess_where_there_is_no_head() -> None:
    convolution = module({}, "RGCNConv", in_channels=16, out_channels=4)
    convolution.weight = nn.Parameter(torch.randn(5, 16, 4))
    with pytest.warns(UserWarning, match="no output head was found"):
        (route,) = find_routes(nn.ModuleDict({"conv2": convolution}))
    assert (route.algorithm, route.confidence) == ("muon", "guess")
