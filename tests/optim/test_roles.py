"""Which algorithm updates which parameter without rules, for common models, and as which matrices."""

import pytest
import torch
from torch import nn

from lightning_muon.optim import MatrixLayout, find_routes, route_parameters
from tests.optim.routed_models import HIDDEN, Conv1D, Transformer, muon


class ResidualNetwork(nn.Module):
    """The anatomy of torchvision's ResNet."""

    class Basic(nn.Module):
        def __init__(self, channels: int, downsample: bool) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, bias=False)
            self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1)) if downsample else None

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, bias=False)
        self.layer1 = nn.Sequential(self.Basic(8, downsample=True), self.Basic(8, downsample=False))
        self.fc = nn.Linear(8, 10)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 16))


@pytest.mark.parametrize("tied", [False, True])
def test_transformer(tied: bool) -> None:
    model = Transformer(tied=tied)
    assert muon(model) == HIDDEN
    reasons = {route.name: route.reason for route in find_routes(model)}
    if tied:
        assert reasons["embedding.weight"] == "output head, tied to an embedding"
        assert "output.weight" not in reasons
    else:
        assert reasons["embedding.weight"] == "embedding"
        assert reasons["output.weight"] == "output head, one side is the vocabulary"
    assert reasons["position"] == "embedding, by its name"
    assert reasons["norm.weight"] == "vector"


def test_without_a_head_no_block_is_taken_for_one() -> None:
    """As where the head is functional, F.linear(x, embedding.weight)."""
    assert muon(Transformer(head=False)) == HIDDEN


def test_fused_projections_are_orthogonalized_block_by_block() -> None:
    model = Transformer()
    layouts = {route.name: route.layout for route in find_routes(model)}
    assert layouts["blocks.0.qkv.weight"] == MatrixLayout(blocks=3)
    attention = nn.MultiheadAttention(8, 2)
    assert {r.name: r.layout for r in find_routes(attention)}["in_proj_weight"] == MatrixLayout(blocks=3)


@pytest.mark.parametrize(
    ("name", "projection", "behind", "blocks"),
    [
        ("qkv", nn.Linear(8, 24), {}, 3),
        ("to_qkv", nn.Linear(8, 24), {}, 3),
        ("to_kv", nn.Linear(8, 40), {}, 2),
        ("to_kv", nn.Linear(8, 41), {}, 1),
        ("qkv", nn.Linear(8, 48), {"proj": nn.Linear(16, 8)}, 3),  # wider inside than outside
        ("to_qkv", nn.Linear(8, 48), {"to_out": nn.Sequential(nn.Linear(16, 8), nn.Dropout())}, 3),
        ("qkv", nn.Linear(8, 24), {"o_proj": nn.Linear(16, 8)}, 1),  # 16 of the queries, 4 and 4 of keys and values
        ("c_attn", Conv1D(32, 8), {"c_proj": Conv1D(8, 16)}, 2),  # keys and values of a cross-attention
        ("in_proj", nn.Linear(8, 32), {"out_proj": nn.Linear(16, 8)}, 2),  # Mamba
        ("in_proj", nn.Linear(8, 24), {}, 1),
        ("Wi", nn.Linear(8, 24), {"Wo": nn.Linear(12, 8)}, 2),  # ModernBERT
        ("wi", nn.Linear(8, 24), {"wo": nn.Linear(24, 8)}, 1),  # T5
    ],
)
def test_blocks_of_a_fused_projection(
    name: str, projection: nn.Module, behind: dict[str, nn.Module], blocks: int
) -> None:
    block = nn.ModuleDict({name: projection, **behind})
    route = find_routes(nn.ModuleDict({"block": block, "head": nn.Linear(8, 2)}))[0]
    assert (route.algorithm, route.layout.blocks) == ("muon", blocks)


@pytest.mark.parametrize(
    ("name", "outputs", "why"),
    [
        ("qkv", 12, "in blocks not known to be equal"),
        ("query_key_value", 24, "head by head, and nothing says their number"),
    ],
)
def test_a_fused_projection_that_stays_whole_says_so(name: str, outputs: int, why: str) -> None:
    route = find_routes(nn.ModuleDict({name: nn.Linear(8, outputs), "head": nn.Linear(8, 2)}))[0]
    assert route.layout == MatrixLayout()
    assert f"{why}: left whole" in route.reason


def test_a_fused_weight_held_directly_is_taken_apart() -> None:
    class PreNormBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_weight = nn.Parameter(torch.randn(24, 8))

    assert find_routes(PreNormBlock())[0].layout == MatrixLayout(blocks=3)


def test_a_linear_layer_whose_class_speaks_of_norms_is_one() -> None:
    kind = type("NormalizedLinear", (nn.Linear,), {})
    assert muon(nn.Sequential(kind(8, 8), nn.Linear(8, 3))) == {"0.weight"}


def test_a_layer_with_one_output_or_one_input_is_a_vector_unless_it_is_the_head() -> None:
    model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Conv2d(8, 1, 1), nn.Linear(8, 2), nn.Linear(2, 1))
    routes = {route.name: route for route in find_routes(model)}
    assert muon(model) == {"1.weight", "3.weight"}
    for name, why in (("0.weight", "one input"), ("2.weight", "one output")):
        assert (routes[name].role, routes[name].options) == ("vector", {"weight_decay": 0.0})
        assert routes[name].reason == f"vector: the layer has {why}"
    assert (routes["4.weight"].role, routes["4.weight"].options) == ("head", {})


@pytest.mark.filterwarnings("error")
def test_a_parameter_marked_by_its_module_does_not_decay() -> None:
    model = nn.ParameterDict({"state": torch.zeros(8, 4)})
    model["state"]._no_weight_decay = True
    group = route_parameters(model)[0]
    assert (group["algorithm"], group["weight_decay"]) == ("adamw", 0.0)


def test_multihead_attention() -> None:
    assert muon(nn.MultiheadAttention(8, 2)) == {"in_proj_weight", "out_proj.weight"}
    separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True)
    assert muon(separate) == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}


def test_transformer_encoder_of_torch() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert muon(model) == {f"layers.{i}.{name}" for i in range(2) for name in names}


def test_small_resnet() -> None:
    model = ResidualNetwork()
    convolutions = {name for name, p in model.named_parameters() if p.ndim == 4}
    assert muon(model) == convolutions
    assert all(route.layout == MatrixLayout() for route in find_routes(model) if route.algorithm == "muon")


def test_mlp_whose_last_linear_is_the_head() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert muon(model) == {"1.weight", "3.weight"}


def test_several_heads_by_name() -> None:
    model = nn.ModuleDict({"trunk": nn.Linear(8, 8), "heads": nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)])})
    assert muon(model) == {"trunk.weight"}


def test_experts_are_a_stack_of_matrices() -> None:
    model = nn.ModuleDict({"experts": Experts(), "head": nn.Linear(8, 2)})
    layouts = {route.name: route.layout for route in find_routes(model) if route.algorithm == "muon"}
    assert layouts == {
        "experts.router.weight": MatrixLayout(),
        "experts.gate_up_proj": MatrixLayout(stacked=True, blocks=2),
        "experts.down_proj": MatrixLayout(stacked=True),
    }


class ExpertStacks(nn.Module):
    """Weights of 4 experts, with a width of 8 outside; the name of this class says what they are."""

    def __init__(self, biases: bool = False, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(4, *shape)))
            if biases:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(4, shape[1])))


def test_experts_stored_in_out_are_told_by_their_shapes() -> None:
    experts = ExpertStacks(gate_up_proj=(8, 24), down_proj=(12, 8))
    layouts = {route.name: route.layout for route in find_routes(experts)}
    assert layouts == {
        "gate_up_proj": MatrixLayout(stacked=True, blocks=2, transposed=True),
        "down_proj": MatrixLayout(stacked=True, transposed=True),
    }
    assert layouts["gate_up_proj"].fans(experts.gate_up_proj.shape) == [(12, 8)]


@pytest.mark.parametrize("old", [False, True])
def test_experts_whose_gate_and_up_alternate(old: bool) -> None:
    """As in GPT-OSS, which older versions of transformers show by the name of the class alone."""
    kind = type("GptOssExperts" if old else "OtherExperts", (ExpertStacks,), {} if old else {"is_concatenated": False})
    routes = {route.name: route for route in find_routes(kind(gate_up_proj=(8, 24), down_proj=(12, 8), biases=True))}
    assert routes["gate_up_proj"].layout == MatrixLayout(stacked=True, transposed=True, blocks=2, interleaved=12)
    gate, up = routes["gate_up_proj"].layout.matrices(gate_up := routes["gate_up_proj"].parameter)[0][:2]
    assert torch.equal(gate, gate_up[0, :, ::2])
    assert torch.equal(up, gate_up[0, :, 1::2])
    assert "gate and up, which alternate" in routes["gate_up_proj"].reason
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        assert routes[name].algorithm == "adamw"
        assert routes[name].options == {"weight_decay": 0.0}


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_without_a_fused_pair_are_told_by_an_attribute(transposed: bool) -> None:
    kind = type("OtherExperts", (ExpertStacks,), {"is_transposed": transposed})
    assert {r.layout for r in find_routes(kind(up_proj=(8, 12), down_proj=(12, 8)))} == {
        MatrixLayout(stacked=True, transposed=transposed)
    }


@pytest.mark.parametrize(("widths", "transposed"), [((8, 12), False), ((12, 8), True)])
def test_experts_are_told_by_their_declared_widths(widths: tuple[int, int], transposed: bool) -> None:
    kind = type("OtherExperts", (ExpertStacks,), {"output_size": widths[0], "input_size": widths[1]})
    assert find_routes(kind(weight=(8, 12)))[0].layout == MatrixLayout(stacked=True, transposed=transposed)


def test_experts_of_unknown_storage_are_announced() -> None:
    with pytest.warns(
        UserWarning, match=r"adamw updates up_proj \(4, 8, 12\): experts, .*\n.*down_proj \(4, 12, 8\): experts, "
    ):
        assert muon(ExpertStacks(up_proj=(8, 12), down_proj=(12, 8))) == set()


def test_experts_with_an_odd_width_are_not_halved() -> None:
    kind = type("OtherExperts", (ExpertStacks,), {"is_transposed": False})
    assert find_routes(kind(gate_up_proj=(7, 8)))[0].layout == MatrixLayout(stacked=True)


def test_the_router_of_experts_is_a_hidden_matrix() -> None:
    class TopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

    linear = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": Experts()})
    for model in (nn.ModuleDict({"moe": linear, "head": nn.Linear(8, 2)}), TopKRouter()):
        route = next(route for route in find_routes(model) if route.name in {"moe.gate.weight", "weight"})
        assert (route.algorithm, route.reason) == ("muon", "hidden matrix, router of experts")


def test_weights_stored_in_out() -> None:
    model = nn.ModuleDict({"c_attn": Conv1D(24, 8), "c_proj": Conv1D(8, 8), "lm_head": nn.Linear(8, 16)})
    layouts = {route.name: route.layout for route in find_routes(model) if route.algorithm == "muon"}
    assert layouts == {
        "c_attn.weight": MatrixLayout(transposed=True, blocks=3),
        "c_proj.weight": MatrixLayout(transposed=True),
    }


@pytest.mark.parametrize(
    ("convolution", "layout"),
    [
        (nn.Conv1d(4, 8, 3), MatrixLayout()),
        (nn.Conv3d(4, 8, 3), MatrixLayout()),
        (nn.Conv2d(4, 8, 3, groups=2), MatrixLayout(blocks=2)),
        (nn.ConvTranspose2d(4, 8, 3), MatrixLayout(transposed=True)),
        (nn.Conv2d(4, 4, 3, groups=4), None),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), None),
    ],
)
def test_convolutions(convolution: nn.Module, layout: MatrixLayout | None) -> None:
    route = find_routes(nn.ModuleDict({"conv": convolution, "head": nn.Linear(2, 2)}))[0]
    assert (route.layout if route.algorithm == "muon" else None) == layout


@pytest.mark.parametrize(
    ("kind", "blocks"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1), (nn.LSTMCell, 4), (nn.GRUCell, 3)]
)
def test_gates_are_blocks(kind: type[nn.Module], blocks: int) -> None:
    model = nn.ModuleDict({"recurrent": kind(6, 8), "head": nn.Linear(8, 2)})
    matrices = [route for route in find_routes(model) if route.algorithm == "muon"]
    assert [route.layout.blocks for route in matrices] == [blocks, blocks]


def test_the_projection_of_an_lstm_has_no_gates() -> None:
    routes = {route.name: route for route in find_routes(nn.LSTM(6, 8, proj_size=4))}
    assert routes["weight_hr_l0"].algorithm == "muon"
    assert routes["weight_hr_l0"].layout == MatrixLayout()


def test_a_bilinear_form_is_no_matrix() -> None:
    assert muon(nn.ModuleDict({"form": nn.Bilinear(4, 5, 6), "head": nn.Linear(6, 2)})) == set()


def test_a_parameter_of_unknown_role_is_announced() -> None:
    class StateSpace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = nn.Parameter(torch.zeros(8, 4))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))

    with pytest.warns(UserWarning, match=r"adamw updates state \(8, 4\): .*, of unknown role"):
        assert muon(StateSpace()) == set()
