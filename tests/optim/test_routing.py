"""Which algorithm updates which parameter, for common models."""

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_muon.optim import MatrixLayout, MuonAdamW, Rule, find_routes, route_parameters, routing_table


def algorithms(model: nn.Module, rules: list[Rule] | None = None) -> dict[str, str]:
    return {route.name: route.algorithm for route in find_routes(model, rules or [])}


def muon(model: nn.Module, rules: list[Rule] | None = None) -> set[str]:
    return {name for name, algorithm in algorithms(model, rules).items() if algorithm == "muon"}


class Block(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)


class Transformer(nn.Module):
    def __init__(self, *, tied: bool = False, head: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.position = nn.Parameter(torch.zeros(10, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        if head:
            self.output = nn.Linear(8, 16, bias=False)
        if tied:
            self.output.weight = self.embedding.weight


HIDDEN = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("qkv", "up", "down")}


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


class Conv1D(nn.Module):
    """Like transformers.pytorch_utils.Conv1D: a linear layer stored (in, out)."""

    def __init__(self, fan_out: int, fan_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(fan_out))


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
        assert reasons["output.weight"] == "output head, the last layer of the model"
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
    ("name", "outputs", "why"), [("qkv", 12, "not known to be equal"), ("query_key_value", 24, "head by head")]
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


def test_magnitudes_of_weight_norm_are_vectors() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"adamw updates 0.weight_v \(8, 8\): their role is not known"):
        routes = {route.name: route for route in find_routes(nn.Sequential(layer, nn.Linear(8, 3)))}
    assert routes["0.weight_g"].reason == "vector"
    assert routes["0.weight_g"].options == {"weight_decay": 0.0}


def test_one_output_makes_a_layer_not_a_vector() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(8, 1), "head": nn.Linear(8, 2)})
    assert muon(model) == {"gate.weight"}


@pytest.mark.filterwarnings("error")
def test_a_parameter_marked_by_its_module_does_not_decay() -> None:
    """As the A_log of Mamba is."""
    model = nn.ParameterDict({"A_log": torch.zeros(8, 4)})
    model["A_log"]._no_weight_decay = True
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


def test_frozen_trunk() -> None:
    model = Transformer()
    model.embedding.requires_grad_(False)
    model.blocks.requires_grad_(False)
    routes = algorithms(model)
    assert {routes[name] for name in HIDDEN} == {"frozen"}
    assert routes["output.weight"] == "adamw"
    names = {name for group in route_parameters(model) for name in group["param_names"]}
    assert names == {"position", "norm.weight", "norm.bias", "output.weight"}


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
    assert layouts["gate_up_proj"].fans(experts.gate_up_proj.shape) == (12, 8)


@pytest.mark.parametrize("old", [False, True])
def test_experts_whose_gate_and_up_alternate_stay_whole(old: bool) -> None:
    """As in GPT-OSS, which older versions of transformers show by the name of the class alone."""
    kind = type("GptOssExperts" if old else "OtherExperts", (ExpertStacks,), {} if old else {"is_concatenated": False})
    routes = {route.name: route for route in find_routes(kind(gate_up_proj=(8, 24), down_proj=(12, 8), biases=True))}
    assert routes["gate_up_proj"].layout == MatrixLayout(stacked=True, transposed=True)
    assert "alternate" in routes["gate_up_proj"].reason
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
        UserWarning, match=r"adamw updates up_proj \(4, 8, 12\), down_proj \(4, 12, 8\): their role is not known"
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
            self.A_log = nn.Parameter(torch.zeros(8, 4))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))

    with pytest.warns(UserWarning, match=r"adamw updates A_log \(8, 4\): their role is not known"):
        assert muon(StateSpace()) == set()


@pytest.mark.filterwarnings("error")
def test_a_rule_settles_an_unknown_role() -> None:
    model = nn.ParameterDict({"table": torch.zeros(3, 4, 4)})
    assert muon(model, [Rule("table", "muon", layout=MatrixLayout(stacked=True))]) == {"table"}


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = Transformer(tied=True)
    groups = route_parameters(model, [Rule("*.up.weight", "muon", {"lr": 0.1})])
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(len(group["params"]) == len(group["param_names"]) == len(group["reasons"]) for group in groups)


def test_vectors_do_not_decay() -> None:
    groups = {group["name"]: group for group in route_parameters(Transformer())}
    assert sorted(groups) == ["adamw", "adamw_vectors", "muon"]
    assert groups["adamw_vectors"]["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in groups["adamw_vectors"]["params"])
    assert "weight_decay" not in groups["adamw"]


def test_rules_override_and_the_first_match_wins() -> None:
    rules = [Rule("blocks.0.up.*", "adamw", {"lr": 1e-4}), Rule("*.up.weight", "muon", {"lr": 0.1, "name": "wide"})]
    model = Transformer()
    groups = {group["name"]: group for group in route_parameters(model, rules)}
    assert muon(model, rules) == HIDDEN - {"blocks.0.up.weight"}
    assert groups["wide"]["param_names"] == ["blocks.1.up.weight"]
    assert groups["wide"]["lr"] == 0.1
    optimizer = MuonAdamW(route_parameters(model, rules), lr=0.01)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}["wide"] == 0.1
    assert any(g["param_names"][0] == "blocks.0.up.weight" and g["lr"] == 1e-4 for g in groups.values())


def test_a_rule_for_muon_keeps_nothing_of_what_adamw_would_do() -> None:
    """A vector would not decay; what is a matrix by a rule does."""
    model = nn.ParameterDict({"row": torch.zeros(1, 8)})
    assert find_routes(model)[0].options == {"weight_decay": 0.0}
    assert find_routes(model, [Rule("row", "muon")])[0].options == {}


def test_a_rule_that_sends_a_head_to_muon_keeps_its_layout() -> None:
    model = nn.ModuleDict({"hidden": nn.Linear(8, 8), "lm_head": Conv1D(16, 8)})
    routes = {route.name: route for route in find_routes(model, [Rule("lm_head.weight", "muon")])}
    assert routes["lm_head.weight"].layout == MatrixLayout(transposed=True)


def test_a_rule_sees_all_names_of_a_tied_weight() -> None:
    routes = algorithms(Transformer(tied=True), [Rule("output.*", "muon")])
    assert routes["embedding.weight"] == "muon"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("*.upp.weight", "adamw"), r"rule '\*.upp.weight' matches no parameter; there are, .*up.weight"),
        (Rule("norm.weight", "muon"), r"sends norm.weight to muon: shape \(8,\) holds no matrix"),
        (Rule("*.up.weight", "sgd"), "algorithm is 'sgd', choose one of muon, adamw"),
    ],
)
def test_a_wrong_rule_raises(rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route_parameters(Transformer(), [rule])


def test_a_rule_behind_another_that_takes_all_raises() -> None:
    with pytest.raises(ValueError, match="has no effect: earlier rules take all"):
        route_parameters(Transformer(), [Rule("*.weight", "adamw"), Rule("*.up.weight", "adamw")])


def test_nothing_to_train_raises() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        route_parameters(Transformer().requires_grad_(False))


def test_parameters_in_place_of_the_module_are_refused() -> None:
    with pytest.raises(TypeError, match="takes the module, not its parameters; got generator"):
        route_parameters(Transformer().parameters())


def test_lazy_modules_are_named() -> None:
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        route_parameters(nn.Sequential(nn.LazyLinear(3)))


def test_names_carry_no_wrapper() -> None:
    wrapped = nn.ModuleDict({"net": torch.compile(Transformer())})
    assert muon(wrapped) == {f"net.{name}" for name in HIDDEN}


def test_any_optimizer_of_torch_takes_the_groups() -> None:
    groups = route_parameters(Transformer())
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "muon": 0.3,
        "adamw": 0.3,
        "adamw_vectors": 0.0,
    }


def test_table_shows_every_reason_once_or_every_parameter() -> None:
    model = Transformer()
    model.blocks[0].norm.requires_grad_(False)
    routes = find_routes(model)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(routing_table(routes))
    short = console.export_text()
    assert all(short.count(f" {reason} ") == 1 for reason in {route.reason for route in routes})
    console.print(routing_table(routes, every_parameter=True))
    long = console.export_text()
    assert all(route.name in long for route in routes)
    assert "32×8" in long


def test_a_part_that_is_unfrozen_is_trained_once_its_groups_are_added() -> None:
    model = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "fc": nn.Linear(8, 3)})
    trunk = model["trunk"].requires_grad_(False)
    optimizer = MuonAdamW(route_parameters(model), lr=0.1)
    trunk.requires_grad_(True)
    for group in route_parameters(model, part=trunk):
        optimizer.add_param_group(group)

    groups = {group["name"]: group["param_names"] for group in optimizer.param_groups}
    assert groups == {
        "adamw": ["fc.weight"],
        "adamw_vectors": ["fc.bias"],
        "muon_trunk": ["trunk.0.weight", "trunk.1.weight"],  # not a head: it is followed by one
        "adamw_vectors_trunk": ["trunk.0.bias", "trunk.1.bias"],
    }
    before = copy.deepcopy(trunk)
    model["fc"](trunk(torch.ones(2, 8))).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(new, old) for new, old in zip(trunk.parameters(), before.parameters(), strict=True))


def test_a_part_of_another_model_raises() -> None:
    model = Transformer()
    with pytest.raises(ValueError, match="LayerNorm has no parameter that requires a gradient"):
        route_parameters(model, part=model.norm.requires_grad_(False))
    with pytest.raises(ValueError, match="part is a Linear that is not in the Transformer that is routed"):
        route_parameters(model, part=nn.Linear(2, 2))
