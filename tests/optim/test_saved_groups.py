"""State dicts load into other groups of the same parameters, exactly; what does not fit is refused by name."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.optim import MuonAdamW, Rule, route_parameters
from tests.earlier_groups import earlier_groups
from tests.optim.routed_models import Transformer

OPTIONS: dict[str, Any] = {"lr": 0.02, "adamw_lr": 0.005, "neuron_beta": 0.9}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("into", ["roles", "earlier"])
def test_other_groups_go_on_as_if_nothing_had_been(into: str, backwards: bool, dtype: torch.dtype) -> None:
    straight, resumed = Transformer().to(dtype), Transformer().to(dtype)
    resumed.load_state_dict(straight.state_dict())
    roles, earlier = route_parameters(straight), earlier_groups(route_parameters(resumed), backwards=backwards)
    optimizer, first = MuonAdamW(roles, **OPTIONS), MuonAdamW(earlier, **OPTIONS)
    assert [group["name"] for group in first.param_groups] != [group["name"] for group in optimizer.param_groups]
    for group in [*optimizer.param_groups, *first.param_groups]:  # as a schedule does
        group["initial_lr"], group["lr"] = group["lr"], 0.5 * group["lr"]
    train(straight, optimizer, 1)
    train(resumed, first, 1)
    if into == "earlier":
        second = MuonAdamW(earlier_groups(route_parameters(resumed)))
        second.load_state_dict(saved(optimizer))
    else:
        second = MuonAdamW(route_parameters(resumed))
        fresh = copy.deepcopy(second.param_groups)
        second.load_state_dict(saved(first))
        for group, before, expected in zip(second.param_groups, fresh, optimizer.param_groups, strict=True):
            assert all(group[key] == before[key] for key in ("name", "role", "reasons", "param_names"))
            assert group.keys() == expected.keys()
            assert {**group, "params": 0} == {**expected, "params": 0}
    train(straight, optimizer, 2)
    train(resumed, second, 2)
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == second.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert value.dtype == second.state[q][key].dtype
            assert torch.equal(value, second.state[q][key])


def test_groups_that_a_rule_splits_take_what_their_parameters_had() -> None:
    model = Transformer()
    first = MuonAdamW(route_parameters(model), **OPTIONS)
    train(model, first, 1)
    second = MuonAdamW(route_parameters(model, [Rule("*.up.weight", "muon", {"momentum": 0.5})]), lr=1.0)
    second.load_state_dict(saved(first))
    assert [group["name"] for group in second.param_groups][:2] == ["matrix", "matrix_2"]
    assert [(group["lr"], group["momentum"]) for group in second.param_groups[:2]] == [(0.02, 0.95)] * 2
    for parameter in model.parameters():
        for key, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][key], value)


def test_parameters_of_one_group_need_the_same_hyperparameters() -> None:
    model = Transformer()
    first = MuonAdamW(route_parameters(model, [Rule("*.up.weight", "muon", {"lr": 0.5})]), lr=0.02)
    message = r"\(matrix\): lr is 0.02 for blocks.0.qkv.weight in the checkpoint and 0.5 for blocks.0.up.weight: route"
    with pytest.raises(ValueError, match=message):
        MuonAdamW(route_parameters(model)).load_state_dict(first.state_dict())


def test_another_algorithm_is_refused_by_the_name_of_its_parameter() -> None:
    model = Transformer()
    first = MuonAdamW(earlier_groups(route_parameters(model)))
    second = MuonAdamW(route_parameters(model, [Rule("blocks.1.up.weight", "adamw")]))
    message = r"\(matrix_adamw\): the algorithm of blocks.1.up.weight is 'muon' in the checkpoint and 'adamw' in this"
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(first.state_dict())
    assert not second.state


def test_groups_without_names_are_matched_by_position() -> None:
    weights = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    first = MuonAdamW([{"params": [weight], "algorithm": "adamw"} for weight in weights])
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    first.step()
    state = first.state_dict()
    for group in state["param_groups"]:
        del group["param_names"]
    second = MuonAdamW([{"params": [weight], "algorithm": "adamw", "name": "mine"} for weight in weights])
    second.load_state_dict(state)
    for weight in weights:
        assert torch.equal(second.state[weight]["exp_avg"], first.state[weight]["exp_avg"])
    merged = MuonAdamW([{"params": weights, "algorithm": "adamw"}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        merged.load_state_dict(state)


def test_equal_names_are_matched_by_position() -> None:
    """As of two models that are routed one by one."""
    models = nn.Linear(3, 3), nn.Linear(3, 3)
    groups = [group for model in models for group in route_parameters(model)]
    first = MuonAdamW(groups)
    for parameter in (p for model in models for p in model.parameters()):
        parameter.grad = torch.randn_like(parameter)
    first.step()
    second = MuonAdamW([group for model in models for group in route_parameters(model)])
    second.load_state_dict(first.state_dict())
    for parameter in (p for model in models for p in model.parameters()):
        assert torch.equal(second.state[parameter]["exp_avg"], first.state[parameter]["exp_avg"])
