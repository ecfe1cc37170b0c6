"""Parameters that are added after the rest was routed get the algorithm of their role."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.optim import MuonAdamW, Rule, route_parameters


def frozen_trunk() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "fc": nn.Linear(8, 3)})
    model["trunk"].requires_grad_(False)
    return model


def unfrozen(model: nn.ModuleDict, **options: Any) -> dict[str, Any]:
    return {"params": list(model["trunk"].requires_grad_(True).parameters()), **options}


def described(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    return [(g["name"], g["algorithm"], g["param_names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


def test_plain_parameters_are_routed_as_the_rest_was() -> None:
    model = frozen_trunk()
    optimizer = MuonAdamW(route_parameters(model), lr=0.1, weight_decay=0.3)
    optimizer.add_param_group(unfrozen(model, lr=0.02))
    assert described(optimizer)[2:] == [
        ("matrix", "muon", ["trunk.0.weight", "trunk.1.weight"], 0.02, 0.3),
        ("vector_2", "adamw", ["trunk.0.bias", "trunk.1.bias"], 0.02, 0.0),
    ]
    before = copy.deepcopy(model["trunk"])
    model["fc"](model["trunk"](torch.ones(2, 8))).square().sum().backward()
    optimizer.step()
    for new, old in zip(model["trunk"].parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old)


def test_without_options_they_have_those_of_their_role() -> None:
    model = frozen_trunk()
    optimizer = MuonAdamW(route_parameters(model), lr=0.1, adamw_lr=0.5)
    optimizer.add_param_group(unfrozen(model))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.1, 0.5]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group(unfrozen(model))


def test_rules_and_parts_are_remembered() -> None:
    model = frozen_trunk()
    rules = [Rule("trunk.0.weight", "adamw", {"weight_decay": 0.5}), Rule("trunk.1.bias", "frozen")]
    optimizer = MuonAdamW(route_parameters(model, rules))
    with pytest.warns(UserWarning, match="trunk.1.bias stay frozen, although they are added: a rule says so"):
        optimizer.add_param_group(unfrozen(model))
    assert [(name, names, decay) for name, _, names, _, decay in described(optimizer)[2:]] == [
        ("matrix", ["trunk.1.weight"], 0.1),
        ("matrix_adamw", ["trunk.0.weight"], 0.5),
        ("vector_2", ["trunk.0.bias"], 0.0),
    ]
    model = frozen_trunk().requires_grad_(True)
    optimizer = MuonAdamW(route_parameters(model, part=model["fc"]))
    optimizer.add_param_group(unfrozen(model, name="trunk"))
    assert [group["name"] for group in optimizer.param_groups][2:] == ["trunk", "trunk_2"]


def test_the_learning_rate_of_the_last_is_that_of_all_of_an_addition() -> None:
    """Lightning's BackboneFinetuning adds one group, and later sets the rate of the last one."""
    model = frozen_trunk()
    optimizer = MuonAdamW(route_parameters(model), lr=0.1)
    optimizer.add_param_group(unfrozen(model, lr=0.02))
    for further in (optimizer, copy.deepcopy(optimizer)):
        further.load_state_dict(further.state_dict())
        further.param_groups[-1]["lr"] = 0.04
        assert [group["lr"] for group in further.param_groups] == [0.1, 0.1, 0.04, 0.04]
        further.param_groups[2]["lr"] = 0.02
        assert [group["lr"] for group in further.param_groups] == [0.1, 0.1, 0.02, 0.04]
    assert all(type(group) is dict for group in optimizer.state_dict()["param_groups"])


def test_what_routing_did_not_see_is_refused() -> None:
    model = frozen_trunk()
    optimizer = MuonAdamW(route_parameters(model))
    for params in (list(nn.Linear(2, 2).parameters()), [*model["trunk"].parameters(), nn.Parameter(torch.ones(2))]):
        with pytest.raises(ValueError, match="parameter group 2: algorithm is None, choose one of muon, adamw"):
            optimizer.add_param_group({"params": params})


def test_other_optimizers_take_the_groups_and_save_them(tmp_path: Any) -> None:
    optimizer = torch.optim.AdamW(route_parameters(frozen_trunk()))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert not optimizer.param_groups[0]["left_out"]
