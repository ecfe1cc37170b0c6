"""Parameter groups that ``MuonAdamW`` takes, and those that it refuses by name."""

import copy
import math

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


def test_a_bad_rate_of_adamw_is_refused() -> None:
    with pytest.raises(ValueError, match="adamw_lr must be at least 0 and finite, got inf"):
        MuonAdamW([group()], adamw_lr=math.inf)


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
