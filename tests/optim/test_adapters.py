"""Adapters: a role of their own, AdamW unless a rule says otherwise, and the matrices where such a rule finds them.

The modules have the anatomy of peft's.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MatrixLayout, MuonAdamW, Rule, find_routes, route_parameters
from lightning_muon.optim.routing.routing import Route
from tests.optim.routed_models import Conv1D

RANK = 2
MUON = Rule("*.lora_[AB].*", "muon")


class LoraLayer(nn.Module):
    """A layer that peft adapts: the base layer and, by adapter, what is trained."""

    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector")

    def __init__(self, base: nn.Module, inputs: int, outputs: int, experts: int = 1) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.in_features, self.out_features = inputs, outputs
        if experts > 1:
            self.num_experts = experts
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, RANK * experts, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK * experts, outputs, bias=False)})
        self.lora_magnitude_vector = nn.ModuleDict()


class Tuner(nn.Module):
    """A layer of another method: parameters by adapter, in dictionaries."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        self.adapter_layer_names = tuple(parameters)
        for name, value in parameters.items():
            setattr(self, name, nn.ParameterDict({"default": value}))


def routes(model: nn.Module, rules: list[Rule] | None = None) -> dict[str, Route]:
    return {route.name: route for route in find_routes(model, rules or [])}


def adapted(name: str, base: nn.Module, inputs: int, outputs: int, **said: Any) -> nn.Module:
    attention = nn.ModuleDict({name: LoraLayer(base, inputs, outputs, said.pop("experts", 1))})
    for key, value in said.items():
        setattr(attention, key, value)
    return nn.ModuleDict({"attention": attention, "lm_head": LoraLayer(nn.Linear(outputs, 3), outputs, 3)})


@pytest.mark.filterwarnings("error")
def test_lora() -> None:
    found = routes(adapted("q_proj", nn.Linear(8, 8), 8, 8))
    for name in ("attention.q_proj.lora_A", "attention.q_proj.lora_B", "lm_head.lora_A", "lm_head.lora_B"):
        route = found[f"{name}.default.weight"]
        assert (route.role, route.algorithm, route.confidence) == ("adapter", "adamw", "known")
        assert route.options == {}
        assert route.reason == f"adapter, {name[-6:]}"
    assert found["attention.q_proj.base_layer.weight"].algorithm == "frozen"


def test_one_rule_gives_the_factors_to_muon() -> None:
    model = adapted("q_proj", nn.Linear(8, 8), 8, 8)
    groups = route_parameters(model, [MUON])
    assert [(group["name"], group["algorithm"]) for group in groups] == [("adapter_muon", "muon")]
    assert len(groups[0]["params"]) == 4


def test_adapters_have_a_learning_rate_of_their_own() -> None:
    groups = route_parameters(adapted("q_proj", nn.Linear(8, 8), 8, 8), lr_by_role={"adapter": 0.003})
    optimizer = MuonAdamW(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.003]


SAID = {"num_heads": 4, "head_dim": 2}


@pytest.mark.parametrize(
    ("name", "base", "outputs", "said", "layout"),
    [
        ("qkv", nn.Linear(8, 24), 24, {}, MatrixLayout(blocks=3)),
        ("c_attn", Conv1D(24, 8), 24, {}, MatrixLayout(blocks=3)),  # the factors are stored (out, in)
        ("qkv_proj", nn.Linear(8, 16), 16, {**SAID, "num_kv_heads": 2}, MatrixLayout(split_sizes=(8, 4, 4))),
        ("gate_up_proj", nn.Linear(8, 24), 24, {}, MatrixLayout(blocks=2)),
        ("attn", nn.MultiheadAttention(8, 2), 24, {}, MatrixLayout(blocks=3)),
        ("o_proj", nn.Linear(8, 24), 24, {}, MatrixLayout()),
    ],
)
def test_the_outputs_of_b_are_cut_as_those_of_the_base_layer(
    name: str, base: nn.Module, outputs: int, said: dict[str, int], layout: MatrixLayout
) -> None:
    found = routes(adapted(name, base, 8, outputs, **said), [MUON])
    assert found[f"attention.{name}.lora_B.default.weight"].layout == layout
    assert found[f"attention.{name}.lora_A.default.weight"].layout == MatrixLayout()


def test_factors_of_experts_are_cut_as_peft_reads_them() -> None:
    """A is (experts, rank, in), and B (out, rank, experts)."""
    experts = 3
    found = routes(adapted("experts", nn.Identity(), 4, 6, experts=experts), [MUON])
    factors = {kind: found[f"attention.experts.lora_{kind}.default.weight"] for kind in "AB"}
    a, b = factors["A"].parameter.detach(), factors["B"].parameter.detach()
    (of_a,), (of_b,) = factors["A"].layout.matrices(a), factors["B"].layout.matrices(b)
    assert torch.equal(of_a, a.reshape(experts, -1, 4))
    assert torch.equal(of_b, b.reshape(6, -1, experts).permute(2, 0, 1))
    assert "of 3 experts" in factors["A"].reason or factors["A"].reason.startswith("rule")


@pytest.mark.filterwarnings("error")
def test_other_methods() -> None:
    model = Tuner(
        hada_w1_a=torch.zeros(8, 2),
        lokr_w1=torch.zeros(4, 4),
        oft_R=torch.zeros(4, 28),
        boft_R=torch.zeros(1, 8, 4, 4),
        vblora_logits_A=torch.zeros(4, 4, 16),
        ia3_l=torch.ones(1, 8),
        lora_E=torch.zeros(2, 1),
        vera_lambda_d=torch.zeros(4),
        trainable_tokens_delta=torch.zeros(2, 8),
    )
    found = {name.split(".")[0]: route for name, route in routes(model).items()}
    vectors = {"ia3_l", "lora_E", "vera_lambda_d"}
    assert {name for name, route in found.items() if route.role == "vector"} == vectors
    assert all(found[name].options == {"weight_decay": 0.0} for name in vectors)
    assert found.pop("trainable_tokens_delta").role == "embedding"
    assert {route.role for name, route in found.items() if name not in vectors} == {"adapter"}
    assert {route.algorithm for route in found.values()} == {"adamw"}


@pytest.mark.filterwarnings("error")
def test_a_copy_of_the_head_that_peft_trains_is_a_head() -> None:
    class Copied(nn.Module):
        adapter_layer_names = ("modules_to_save",)

        def __init__(self) -> None:
            super().__init__()
            self.original_module = nn.Linear(8, 3).requires_grad_(False)
            self.modules_to_save = nn.ModuleDict({"default": nn.Linear(8, 3)})

    found = routes(nn.ModuleDict({"body": nn.Linear(8, 8), "classifier": Copied()}))
    assert found["classifier.modules_to_save.default.weight"].role == "head"


def test_prompts_of_a_model_of_peft() -> None:
    encoder = nn.ModuleDict({"embedding": nn.Embedding(4, 8), "mlp": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})
    model = nn.ModuleDict({"prompt_encoder": nn.ModuleDict({"default": encoder})})
    assert "adapter" not in {route.role for route in find_routes(model)}  # SAM has a prompt_encoder as well
    vars(model)["peft_config"] = {}
    assert {route.role for route in find_routes(model) if route.shape.numel() > 8} == {"adapter"}


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("layers", [False, True])
def test_lora_without_peft_is_told_by_its_names(names: tuple[str, str], layers: bool) -> None:
    layer = nn.Linear(8, 8)
    for name, (inputs, outputs) in zip(names, ((8, RANK), (RANK, 8)), strict=True):
        factor = nn.Linear(inputs, outputs, bias=False)
        setattr(layer, name, factor if layers else nn.Parameter(factor.weight.detach()))
    found = routes(nn.ModuleDict({"body": layer, "head": nn.Linear(8, 3)}))
    factors = [route for name, route in found.items() if any(own in name for own in names)]
    assert [(route.role, route.confidence) for route in factors] == [("adapter", "by name")] * 2
    assert found["body.weight"].role == "matrix"
