"""Rules, and the parameter groups that come of them."""

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_muon.optim import MatrixLayout, MuonAdamW, Rule, find_routes, route_parameters, routing_table
from tests.optim.routed_models import HIDDEN, Conv1D, Transformer, algorithms, muon


def test_frozen_trunk() -> None:
    model = Transformer()
    model.embedding.requires_grad_(False)
    model.blocks.requires_grad_(False)
    routes = algorithms(model)
    assert {routes[name] for name in HIDDEN} == {"frozen"}
    assert routes["output.weight"] == "adamw"
    names = {name for group in route_parameters(model) for name in group["param_names"]}
    assert names == {"position", "norm.weight", "norm.bias", "output.weight"}


def test_a_rule_keeps_parameters_out_of_the_groups() -> None:
    model = Transformer()
    rules = [Rule("blocks.0.*", "frozen"), Rule("*.up.weight", "muon", {"lr": 0.1})]
    routes = {route.name: route for route in find_routes(model, rules)}
    assert (routes["blocks.0.up.weight"].algorithm, routes["blocks.0.up.weight"].role) == ("frozen", "matrix")
    assert routes["blocks.0.up.weight"].reason == "rule 'blocks.0.*'"
    grouped = {name for group in route_parameters(model, rules) for name in group["param_names"]}
    assert grouped == {name for name, _ in model.named_parameters() if not name.startswith("blocks.0.")}

    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    MuonAdamW(route_parameters(model, rules)).step()
    for name, old in before.named_parameters():
        assert torch.equal(model.get_parameter(name), old) == name.startswith("blocks.0."), name


def test_complex_parameters_go_to_adamw() -> None:
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4, dtype=torch.complex64), "lm_head": nn.Linear(4, 4)})
    groups = {group["name"]: group for group in route_parameters(model)}
    assert groups["matrix_adamw"]["param_names"] == ["hidden.weight"]
    assert groups["matrix_adamw"]["reasons"] == ["complex: hidden matrix"]
    assert groups["vector"]["param_names"] == ["hidden.bias", "lm_head.bias"]
    with pytest.raises(ValueError, match=r"sends hidden.weight to muon: it is torch.complex64, .* Route it to adamw"):
        route_parameters(model, [Rule("hidden.weight", "muon")])


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
    assert list(groups) == ["matrix", "embedding", "head", "vector"]
    assert groups["vector"]["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in groups["vector"]["params"])
    assert all("weight_decay" not in groups[name] for name in ("matrix", "embedding", "head"))


def test_groups_are_named_by_role_and_by_an_unusual_algorithm() -> None:
    model = nn.ModuleDict(
        {
            "filters": nn.Conv1d(4, 4, 3, groups=4),
            "embedding": nn.Embedding(16, 8),
            "blocks": nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 8), "router": nn.Linear(8, 4)}) for _ in range(2)
            ),
            "lm_head": nn.Linear(8, 16),
        }
    )
    rules = [
        Rule("blocks.0.up.weight", "adamw"),
        Rule("blocks.1.up.weight", "adamw", {"lr": 0.1}),
        Rule("embedding.*", "muon"),
    ]
    groups = route_parameters(model, rules)
    assert {group["name"]: (group["algorithm"], group["role"], group["param_names"]) for group in groups} == {
        "router": ("muon", "router", ["blocks.0.router.weight", "blocks.1.router.weight"]),
        "embedding_muon": ("muon", "embedding", ["embedding.weight"]),
        "matrix_adamw": ("adamw", "matrix", ["blocks.0.up.weight"]),
        "matrix_adamw_2": ("adamw", "matrix", ["blocks.1.up.weight"]),
        "head": ("adamw", "head", ["lm_head.weight"]),
        "vector": ("adamw", "vector", [n for n, p in model.named_parameters() if p.ndim == 1]),
        "other": ("adamw", "other", ["filters.weight"]),
    }


def test_a_tied_weight_is_a_head() -> None:
    groups = {group["name"]: group["param_names"] for group in route_parameters(Transformer(tied=True))}
    assert groups["head"] == ["embedding.weight"]
    assert groups["embedding"] == ["position"]


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
        (Rule("*.up.weight", "sgd"), "algorithm is 'sgd', choose one of muon, adamw, frozen"),  # type: ignore[arg-type]
        (Rule("*.up.weight", "frozen", {"lr": 0.1}), "'*.up.weight': what is frozen has no use for the options .*lr"),
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
        "matrix": 0.3,
        "embedding": 0.3,
        "head": 0.3,
        "vector": 0.0,
    }


def test_table_shows_every_reason_once_or_every_parameter() -> None:
    model = Transformer()
    model.blocks[0].norm.requires_grad_(False)
    routes = find_routes(model)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(routing_table(routes))
    short = console.export_text()
    rows = [[cell.strip() for cell in line.split("│")] for line in short.splitlines()]
    shown = sorted(tuple(row[1:4]) for row in rows if len(row) > 4)
    assert shown == sorted({(route.algorithm, route.role, route.reason) for route in routes})
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
        "head": ["fc.weight"],
        "vector": ["fc.bias"],
        "matrix_trunk": ["trunk.0.weight", "trunk.1.weight"],  # not a head: it is followed by one
        "vector_trunk": ["trunk.0.bias", "trunk.1.bias"],
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
