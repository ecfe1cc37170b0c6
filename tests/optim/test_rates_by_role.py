"""Learning rates by role, in the groups that any optimizer takes."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_muon.optim import MuonAdamW, Rule, route_parameters

RATES = {"embedding": 0.3, "head": 0.008, "vector": 0.4}


def model() -> nn.ModuleDict:
    parts = {"embed": nn.Embedding(5, 8), "trunk": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}
    return nn.ModuleDict({**parts, "fc": nn.Linear(8, 3)})


def rates(optimizer: torch.optim.Optimizer, key: str = "lr") -> dict[str, float]:
    return {group["name"]: group[key] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("make", "matrix", "decay"),
    [
        (partial(MuonAdamW, lr=0.02, adamw_lr=0.01), 0.02, 0.1),
        (partial(torch.optim.AdamW, lr=0.02), 0.02, 0.01),
        (partial(torch.optim.SGD, lr=0.02, momentum=0.9), 0.02, 0.0),
    ],
)
def test_any_optimizer_takes_them(make: Callable[..., torch.optim.Optimizer], matrix: float, decay: float) -> None:
    """A rule's own rate comes before them, and they before those of the optimizer; a schedule scales all."""
    rules = [Rule("trunk.1.bias", "adamw", {"lr": 0.5})]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(route_parameters(model(), rules, lr_by_role=RATES))
    assert rates(optimizer) == {"matrix": matrix, **RATES, "vector_2": 0.5}
    assert rates(optimizer, "weight_decay")["matrix"] == decay
    assert rates(optimizer, "weight_decay")["vector"] == 0.0
    LambdaLR(optimizer, lambda _: 0.5)
    assert rates(optimizer) == {name: lr / 2 for name, lr in rates(optimizer, "initial_lr").items()}


def test_groups_that_are_added_later_follow_them() -> None:
    """Of parameters that were frozen, whose role is not one without effect."""
    for given, expected in (({}, 0.5), ({"lr": 0.2}, 0.2)):
        whole = model()
        trunk = whole["trunk"].requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = MuonAdamW(route_parameters(whole, lr_by_role={"matrix": 0.5}), lr=0.1)
        assert set(rates(optimizer).values()) == {0.1}
        optimizer.add_param_group({"params": list(trunk.parameters()), **given})
        assert rates(optimizer)["matrix"] == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 0.1}, "lr_by_role has the unknown role 'heads'; roles are matrix, router, embedding,"),
        ({"matrix": 0.1, "head": -1.0}, "lr_by_role: head must be at least 0 and finite, got -1"),
        ({"head": math.nan}, "lr_by_role: head must be at least 0 and finite, got nan"),
        ({"head": "0.1"}, "lr_by_role: head must be a number, got '0.1'"),
    ],
)
def test_wrong_ones_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route_parameters(model(), lr_by_role=wrong)


def test_rates_of_which_none_counts_are_warned_of() -> None:
    expected = (
        r"lr_by_role has no effect: no parameter is router\. Roles of the model: matrix, embedding, head, vector\."
    )
    with pytest.warns(UserWarning, match=expected):
        route_parameters(model(), lr_by_role={"router": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route_parameters(model(), lr_by_role={"router": 0.1, "matrix": 0.2})  # a preset for many kinds of models
