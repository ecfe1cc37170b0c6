"""The routes that optimizers use are those that routing found."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_muon.optim import MuonAdamW, Route, Rule, find_routes, route_parameters
from lightning_muon.optim.routing.used import used_routes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.second.requires_grad_(False)


def facts(routes: list[Route]) -> dict[str, tuple[object, ...]]:
    return {r.name: (r.parameter, r.shape, r.algorithm, r.role, r.reason, r.layout) for r in routes}


@pytest.mark.parametrize("optimizer", [MuonAdamW, torch.optim.AdamW])
def test_all_that_the_table_shows(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model = Model()
    rules = [Rule("first.weight", "adamw", {"lr": 0.5}), Rule("head.bias", "frozen")]
    made = optimizer(route_parameters(model, rules), lr=0.1)
    found = used_routes([made])
    assert facts(found) == facts(find_routes(model, rules))
    by = {"muon", "adamw", "frozen"} if optimizer is MuonAdamW else {"AdamW", "frozen"}  # AdamW heeds no algorithm
    assert {route.updated_by for route in found} == by


def test_parts_of_a_model_with_an_optimizer_each() -> None:
    model = Model()
    parts = [MuonAdamW(route_parameters(model, part=part), lr=0.1) for part in (model.attention, model.head)]
    found = {route.name: route for route in used_routes(parts)}
    expected = {route.name: route for route in find_routes(model)}
    idle = {name for name in expected if name.split(".")[0] in {"embedding", "first"}}
    for name in idle:
        expected[name] = replace(expected[name], algorithm="frozen", reason="in no group")
    assert {name: (r.algorithm, r.reason) for name, r in found.items()} == {
        name: (r.algorithm, r.reason) for name, r in expected.items()
    }


def test_groups_of_another_kind_have_no_routes() -> None:
    model = Model()
    assert used_routes([torch.optim.AdamW(model.parameters())]) == []
    assert used_routes([MuonAdamW([{"params": list(model.head.parameters()), "algorithm": "adamw"}], lr=0.1)]) == []
