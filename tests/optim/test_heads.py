"""Attention by head, and fused projections: cut as the forward of each model reads them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MatrixLayout, MuonAdamW, Rule, find_routes, route_parameters
from tests.optim.routed_models import Conv1D

WIDTH, HEADS, SIZE = 8, 4, 2


class Attention(nn.Module):
    """An attention module by its attributes and projections alone: ``said`` are its numbers, or a ``config``."""

    def __init__(self, projections: dict[str, nn.Module], **said: Any) -> None:
        super().__init__()
        for name, value in {**said, **projections}.items():
            setattr(self, name, value)


def linear(outputs: int, inputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def layouts(model: nn.Module, *, per_head: bool = False) -> dict[str, MatrixLayout]:
    routes = find_routes(nn.ModuleDict({"part": model, "head": nn.Linear(5, 3)}), per_head=per_head)
    return {route.name.removeprefix("part."): route.layout for route in routes}


def reasons(model: nn.Module, *, per_head: bool = False) -> dict[str, str]:
    routes = find_routes(nn.ModuleDict({"part": model, "head": nn.Linear(5, 3)}), per_head=per_head)
    return {route.name.removeprefix("part."): route.reason for route in routes}


def by_head(rows: Tensor) -> list[Tensor]:
    """Query, key and value of rows that have (heads, 3, size)."""
    return [part.flatten(0, 1) for part in rows.view(HEADS, 3, SIZE, WIDTH).unbind(1)]


def by_group(rows: Tensor) -> list[Tensor]:
    """Of rows that have two groups of two queries, one key and one value."""
    groups = rows.view(2, 4, SIZE, WIDTH)
    return [part.flatten(0, -2) for part in (groups[:, :2], groups[:, 2], groups[:, 3])]


def one_after_another(*heads: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda rows: list(rows.split([SIZE * number for number in heads]))


def in_four_pieces(rows: Tensor) -> list[Tensor]:
    """Of rows that have query, value and key of a quarter of the heads, four times."""
    return [part.flatten(0, 1) for part in rows.view(4, 3, WIDTH // 4, WIDTH).unbind(1)]


SAID = {"num_heads": HEADS, "head_dim": SIZE}
KINDS: dict[str, tuple[str, str, dict[str, Any], Callable[[Tensor], list[Tensor]], str]] = {
    # name of the projection, class, numbers, its parts as the forward takes them, what the table says
    "GPT-NeoX": (
        "query_key_value",
        "GPTNeoXAttention",
        {"head_size": SIZE, "config": SimpleNamespace(num_attention_heads=HEADS)},
        by_head,
        "query, key and value of 4, 4 and 4 heads, fused head by head",
    ),
    "BLOOM": ("query_key_value", "BloomAttention", SAID, by_head, "4, 4 and 4 heads, fused head by head"),
    "Falcon 7B": (
        "query_key_value",
        "FalconAttention",
        {**SAID, "num_kv_heads": 1, "multi_query": True},
        one_after_another(4, 1, 1),
        "query, key and value of 4, 1 and 1 heads, fused",
    ),
    "Falcon 40B": (
        "query_key_value",
        "FalconAttention",
        {**SAID, "num_kv_heads": 2},
        by_group,
        "query, key and value of 4, 2 and 2 heads, fused by group",
    ),
    "InternLM2": (
        "wqkv",
        "InternLM2Attention",
        {**SAID, "num_key_value_heads": 2},
        by_group,
        "4, 2 and 2 heads, fused by group",
    ),
    "gpt-fast": (
        "wqkv",
        "Attention",
        {"n_head": HEADS, "n_local_heads": 2, "head_dim": SIZE},
        one_after_another(4, 2, 2),
        "4, 2 and 2 heads, fused",
    ),
    "Phi-3": (
        "qkv_proj",
        "Phi3Attention",
        {"head_dim": SIZE, "config": SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=2)},
        one_after_another(4, 2, 2),
        "query, key and value of 4, 2 and 2 heads, fused",
    ),
    "GPTBigCode": (
        "c_attn",
        "GPTBigCodeAttention",
        {**SAID, "kv_heads": 1, "multi_query": True},
        one_after_another(4, 1, 1),
        "query, key and value of 4, 1 and 1 heads, fused",
    ),
    "GPTBigCode without multi-query": (
        "c_attn",
        "GPTBigCodeAttention",
        {**SAID, "kv_heads": HEADS, "multi_query": False},
        by_head,
        "4, 4 and 4 heads, fused head by head",
    ),
    "CodeGen": ("qkv_proj", "CodeGenAttention", SAID, in_four_pieces, "query, value and key, fused in 4 pieces"),
    "ModernBERT": ("Wqkv", "ModernBertAttention", SAID, one_after_another(4, 4, 4), "3 fused blocks"),
}


def fused(kind: str) -> tuple[Attention, str, Callable[[Tensor], list[Tensor]]]:
    name, class_name, said, parts, _ = KINDS[kind]
    keys = {"num_kv_heads", "num_key_value_heads", "n_local_heads", "kv_heads"} & said.keys()
    number = said[keys.pop()] if keys else getattr(said.get("config"), "num_key_value_heads", HEADS)
    rows = (HEADS + 2 * number) * SIZE
    cls = type(class_name, (Attention,), {})
    return cls({name: linear(rows), "dense": linear(WIDTH)}, **said), f"{name}.weight", parts


@pytest.mark.parametrize("kind", KINDS)
def test_fused_projections_are_cut_as_the_forward_reads_them(kind: str) -> None:
    attention, name, parts = fused(kind)
    weight = attention.get_parameter(name).detach()
    found = [matrix for batch in layouts(attention)[name].matrices(weight) for matrix in batch]
    assert len(found) == 3
    for block, expected in zip(found, parts(weight), strict=True):
        assert torch.equal(block, expected)
    assert reasons(attention)[name].endswith(KINDS[kind][-1])


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_cut_as_the_forward_reads_them(kind: str) -> None:
    attention, name, parts = fused(kind)
    weight = attention.get_parameter(name).detach()
    (found,) = layouts(attention, per_head=True)[name].matrices(weight)
    expected = [head for part in parts(weight) for head in part.split(SIZE)]
    assert len(found) == len(expected)
    assert all(any(torch.equal(head, other) for other in found) for head in expected)
    assert "query, key and value by head (4, " in reasons(attention, per_head=True)[name]
    assert layouts(attention, per_head=True)["dense.weight"] == MatrixLayout(blocks=HEADS, along_inputs=True)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_that_of_separate_layers(kind: str, per_head: bool) -> None:
    """Of query, key and value, or of a layer for each head, with the scales of their own shapes."""
    attention, name, parts = fused(kind)
    attention.double()
    weight = attention.get_parameter(name)

    def separate(rows: Tensor) -> list[Tensor]:
        return [head for part in parts(rows) for head in (part.split(SIZE) if per_head else [part])]

    layers = nn.ModuleList(linear(len(rows)).double() for rows in separate(weight))
    for layer, rows in zip(layers, separate(weight), strict=True):
        layer.weight.data.copy_(rows.detach())
    options: dict[str, Any] = {"lr": 0.1, "orthogonalizer": "svd", "update_scale": "mup", "neuron_beta": 0.9}
    groups = [g for g in route_parameters(attention, per_head=per_head) if g["algorithm"] == "muon"]
    group = {"params": [layer.weight for layer in layers], "algorithm": "muon"}
    optimizers = MuonAdamW(groups, **options), MuonAdamW([group], **options)
    for step in range(3):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        weight.grad = gradient
        for layer, rows in zip(layers, separate(gradient), strict=True):
            layer.weight.grad = rows.clone()
        for optimizer in optimizers:
            optimizer.step()
    for layer, rows in zip(layers, separate(weight.detach()), strict=True):
        torch.testing.assert_close(rows, layer.weight.detach(), rtol=0, atol=1e-8)


def test_separate_projections_by_head() -> None:
    said = {"num_heads": HEADS, "head_dim": SIZE, "num_key_value_heads": 2}
    projections = {"q_proj": linear(8), "k_proj": linear(4), "v_proj": linear(4), "o_proj": linear(6, 8)}
    attention = Attention(projections, **said)
    assert layouts(attention, per_head=True) | {"head.weight": None, "head.bias": None} == {
        "q_proj.weight": MatrixLayout(blocks=4),
        "k_proj.weight": MatrixLayout(blocks=2),
        "v_proj.weight": MatrixLayout(blocks=2),
        "o_proj.weight": MatrixLayout(blocks=4, along_inputs=True),
        "head.weight": None,
        "head.bias": None,
    }
    table = reasons(attention, per_head=True)
    assert table["q_proj.weight"] == "hidden matrix, by head (4)"
    assert table["o_proj.weight"] == "hidden matrix, inputs by head (4)"
    assert {layouts(attention)[f"{name}.weight"] for name in projections} == {MatrixLayout()}


def test_multihead_attention_of_torch_by_head() -> None:
    found = layouts(nn.MultiheadAttention(WIDTH, HEADS), per_head=True)
    assert found["in_proj_weight"] == MatrixLayout(blocks=3 * HEADS)
    assert found["out_proj.weight"] == MatrixLayout(blocks=HEADS, along_inputs=True)
    apart = layouts(nn.MultiheadAttention(WIDTH, HEADS, kdim=5, vdim=6), per_head=True)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        assert apart[name] == MatrixLayout(blocks=HEADS)


def test_gpt2_by_head() -> None:
    """Stored (in, out)."""
    attention = Attention({"c_attn": Conv1D(3 * WIDTH, WIDTH), "c_proj": Conv1D(WIDTH, WIDTH)}, num_heads=HEADS)
    mlp = nn.ModuleDict({"c_fc": Conv1D(32, WIDTH), "c_proj": Conv1D(WIDTH, 32)})
    found = layouts(nn.ModuleDict({"attn": attention, "mlp": mlp}), per_head=True)
    assert found["attn.c_attn.weight"] == MatrixLayout(blocks=12, transposed=True)
    assert found["attn.c_proj.weight"] == MatrixLayout(blocks=4, transposed=True, along_inputs=True)
    assert found["mlp.c_proj.weight"] == MatrixLayout(transposed=True)


def test_the_output_projection_may_be_beside() -> None:
    """As in BERT, where only the model's config says the number; and in a sequence with dropout, as in diffusers."""
    attention = nn.ModuleDict(
        {
            "self": nn.ModuleDict({name: linear(WIDTH) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": linear(WIDTH)}),
        }
    )
    layer = nn.ModuleDict({"attention": attention, "output": nn.ModuleDict({"dense": linear(WIDTH, 32)})})
    model = Attention({"layer": layer}, config=SimpleNamespace(num_attention_heads=HEADS))
    found = layouts(model, per_head=True)
    for name in ("query", "key", "value"):
        assert found[f"layer.attention.self.{name}.weight"] == MatrixLayout(blocks=HEADS)
    assert found["layer.attention.output.dense.weight"] == MatrixLayout(blocks=HEADS, along_inputs=True)
    assert found["layer.output.dense.weight"] == MatrixLayout()

    projections = {name: linear(WIDTH) for name in ("to_q", "to_k", "to_v")}
    diffusers = Attention({**projections, "to_out": nn.ModuleList([linear(WIDTH), nn.Dropout()])}, heads=HEADS)
    assert layouts(diffusers, per_head=True)["to_out.0.weight"] == MatrixLayout(blocks=HEADS, along_inputs=True)


def test_latent_attention_by_head() -> None:
    """DeepSeek's: heads of queries, keys and values have sizes of their own."""
    said = {"num_heads": HEADS, "qk_nope_head_dim": 3, "qk_head_dim": 5, "v_head_dim": 2}
    projections = {"q_b_proj": linear(20), "kv_b_proj": linear(20, 6), "o_proj": linear(WIDTH, 8)}
    attention = Attention(projections, **said, config=SimpleNamespace(head_dim=2))
    found = layouts(attention, per_head=True)
    assert found["q_b_proj.weight"] == MatrixLayout(blocks=HEADS)
    assert found["kv_b_proj.weight"] == MatrixLayout(split_sizes=(3, 2) * HEADS)
    assert found["o_proj.weight"] == MatrixLayout(blocks=HEADS, along_inputs=True)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "not by head: nothing says their number"),
        ({"num_heads": 3}, "not by head: 3 heads do not make its 8 outputs"),
        ({"num_heads": 4, "head_dim": 3}, "not by head: 4 heads of 3 do not make its 8 outputs"),
    ],
)
def test_what_cannot_be_cut_by_head_says_why(said: dict[str, int], why: str) -> None:
    """And is left as it is without; a rule may cut it."""
    attention = Attention({"q_proj": linear(8), "k_proj": linear(8)}, **said)
    with pytest.warns(UserWarning, match=r"per_head has no effect.*blocks=heads"):
        routes = {route.name: route for route in find_routes(attention, per_head=True)}
    assert routes["q_proj.weight"].reason.endswith(why)
    assert routes["q_proj.weight"].layout == MatrixLayout()
    rule = Rule("q_proj.weight", "muon", layout=MatrixLayout(blocks=2))
    with pytest.warns(UserWarning, match="per_head has no effect"):
        by_rule = {route.name: route.layout for route in find_routes(attention, [rule], per_head=True)}
    assert by_rule["q_proj.weight"] == MatrixLayout(blocks=2)


def test_grouped_queries_of_unknown_number_stay_whole() -> None:
    """As where the heads are known, but not of how many rows, and they would divide the outputs by chance."""
    attention = Attention({"qkv": linear(24), "o_proj": linear(WIDTH, 16)}, num_heads=HEADS)
    assert layouts(attention)["qkv.weight"] == MatrixLayout()
    assert "left whole" in reasons(attention)["qkv.weight"]


def test_only_attention_is_cut_by_head() -> None:
    model = Attention({"proj": linear(WIDTH), "dense": linear(WIDTH), "query": linear(WIDTH)}, num_heads=HEADS)
    with pytest.warns(UserWarning, match="per_head has no effect"):
        assert set(layouts(model, per_head=True).values()) == {MatrixLayout()}
