"""Parameter groups that ``MuonAdamW`` takes, and those that it refuses by name."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.optim import MuonAdamW


def group(**options: object) -> dict[str, object]:
    return {"params": [nn.Parameter(torch.zeros(2, 2))], "algorithm": "muon", "name": "mine", **options}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (group(algorithm="sgd"), r"group 0 \(mine\): algorithm is 'sgd', choose one of muon, adamw"),
        ({"params": [nn.Parameter(torch.zeros(2, 2))]}, "group 0: algorithm is None.*route_parameters"),
        (group(momentun=0.9), "mine.*unknown option 'momentun'; known are lr"),
        (group(lr=-1.0), "mine.*lr must be at least 0 and finite, got -1"),
        (group(lr=math.inf), "mine.*lr must be at least 0 and finite, got inf"),
        (group(lr=math.nan), "mine.*lr must be at least 0 and finite, got nan"),
        (group(weight_decay=math.inf), "mine.*weight_decay must be at least 0 and finite, got inf"),
        (group(algorithm="adamw", eps=math.inf), "mine.*eps must be at least 0 and finite, got inf"),
        (group(momentum=math.nan), "mine.*momentum must be at least 0 and below 1, got nan"),
        (
            group(role="heads"),
            "mine.*'heads', choose one of matrix, router, embedding, head, adapter, vector, other",
        ),
        (group(lr="fast"), "mine.*lr must be a number, got 'fast'"),
        (group(momentum=1.0), "mine.*momentum must be at least 0 and below 1"),
        (group(weight_decay=float("nan")), "mine.*weight_decay must be at least 0"),
        (group(betas=(0.9, 1.5)), r"mine.*betas\[1\] must be"),
        (group(betas=(0.9,)), "mine.*betas must be two numbers"),
        (group(update_scale="big"), "mine.*unknown update_scale 'big'"),
        (group(orthogonalizer="qr"), "mine.*unknown orthogonalizer 'qr'"),
        (group(orthogonalizer_options={"stepz": 5}), "mine.*no option 'stepz'"),
        (group(orthogonalizer_options={"steps": "five"}), "mine.*"),
        (group(orthogonalizer_options={"coefficients": (1, 2)}), "mine.*coefficients must be three numbers"),
        (group(neuron_beta=1.0), "mine.*neuron_beta must be at least 0 and below 1"),
        (group(batch_elements=0), "mine.*batch_elements must be at least 1"),
        (group(params=[nn.Parameter(torch.zeros(3))], param_names=["bias"]), r"mine.*bias has shape \(3,\)"),
        (group(params=[nn.Parameter(torch.zeros(3, 2, 2))], param_names=["w"]), "w has shape.*route_parameters"),
        (
            group(params=[nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], param_names=["phases"]),
            "mine.*phases is torch.complex64, and Muon updates real matrices: move it to a group with .* 'adamw'",
        ),
        (group(param_names=["a", "b"]), "2 param_names for 1 parameters"),
        (group(layouts=[{"blocks": 3}]), "does not divide into 3 blocks"),
    ],
)
def test_bad_groups_are_refused_by_name(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonAdamW([bad])


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"adamw_lr": math.inf}, "adamw_lr must be at least 0 and finite, got inf"),
        (
            {"lr_by_role": {"heads": 0.1}},
            "lr_by_role has the unknown role 'heads'; roles are matrix, router, embedding,",
        ),
        ({"lr_by_role": {"matrix": 0.1, "head": -1.0}}, r"lr_by_role\['head'\] must be at least 0 and finite, got -1"),
        ({"lr_by_role": {"head": math.nan}}, r"lr_by_role\['head'\] must be at least 0 and finite, got nan"),
        ({"lr_by_role": {"head": "0.1"}}, r"lr_by_role\['head'\] must be a number, got '0.1'"),
    ],
)
def test_bad_rates_are_refused_by_name(rates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonAdamW([group()], **rates)


def test_rates_by_role_come_before_the_others_and_after_a_groups_own() -> None:
    roles = [("matrix", "muon"), ("router", "muon"), ("head", "adamw"), ("vector", "adamw"), ("embedding", "adamw")]
    groups = [group(role=role, name=role, algorithm=algorithm) for role, algorithm in roles]
    groups += [group(role="head", name="mine", algorithm="adamw", lr=0.5), group(name="none")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = MuonAdamW(groups, lr=0.02, adamw_lr=0.01, lr_by_role={"router": 0.3, "head": 0.008, "vector": 0.4})
    expected = {
        "matrix": 0.02,
        "router": 0.3,
        "head": 0.008,
        "vector": 0.4,
        "embedding": 0.01,
        "mine": 0.5,
        "none": 0.02,
    }
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == expected
    twin = copy.deepcopy(optimizer)  # as for groups that are added later
    twin.add_param_group(group(role="vector"))
    assert twin.param_groups[-1]["lr"] == 0.4


def test_a_rate_of_a_role_that_no_group_has_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"lr_by_role\['head'\] has no effect: .* Roles of the groups: matrix\."):
        MuonAdamW([group(role="matrix")], lr_by_role={"head": 0.1, "matrix": 0.2})


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = MuonAdamW([group()])
    with pytest.raises(ValueError, match="shape"):
        optimizer.add_param_group(group(params=[nn.Parameter(torch.zeros(3))]))
    assert len(optimizer.param_groups) == 1


def test_a_set_of_parameters_is_refused_as_by_torch() -> None:
    with pytest.raises(TypeError, match="ordered collections"):
        MuonAdamW([{"params": {nn.Parameter(torch.zeros(2, 2))}, "algorithm": "muon"}])


def test_a_copy_knows_adamws_learning_rate() -> None:
    twin = copy.deepcopy(MuonAdamW([group()], lr=0.02, adamw_lr=0.001))
    twin.add_param_group(group(algorithm="adamw"))
    assert twin.param_groups[1]["lr"] == 0.001
