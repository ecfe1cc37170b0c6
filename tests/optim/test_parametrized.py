"""Weights that their layers compute: the parameters behind them have the role of the weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_muon.optim import MatrixLayout, Rule, find_routes
from lightning_muon.optim.routing.routing import Route
from tests.optim.routed_models import Conv1D

Parametrized = Callable[[nn.Module], nn.Module]


def routes(model: nn.Module, rules: list[Rule] | None = None) -> dict[str, Route]:
    return {route.name: route for route in find_routes(model, rules or [])}


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("parametrized", "direction", "magnitude"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original1", "parametrizations.weight.original0"),
        (old_weight_norm, "weight_v", "weight_g"),
        (parametrizations.spectral_norm, "parametrizations.weight.original", ""),
        (nn.utils.spectral_norm, "weight_orig", ""),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight_orig", ""),
    ],
)
def test_the_direction_is_a_matrix_and_the_magnitude_a_vector(
    parametrized: Parametrized, direction: str, magnitude: str
) -> None:
    model = nn.ModuleDict({"body": parametrized(nn.Linear(4, 8)), "head": nn.Linear(8, 3)})
    found = routes(model)[f"body.{direction}"]
    assert (found.algorithm, found.role, found.layout, found.confidence) == ("muon", "matrix", MatrixLayout(), "known")
    assert found.reason == "hidden matrix, parametrized"
    if magnitude:
        found = routes(model)[f"body.{magnitude}"]
        assert (found.algorithm, found.role, found.options) == ("adamw", "vector", {"weight_decay": 0.0})
        assert "magnitudes" in found.reason


def test_the_layout_is_that_of_the_layer() -> None:
    model = nn.ModuleDict(
        {
            "conv": parametrizations.weight_norm(nn.Conv2d(4, 8, 3, groups=2)),
            "up": parametrizations.weight_norm(nn.ConvTranspose1d(8, 4, 3)),
            "stored": parametrizations.spectral_norm(Conv1D(8, 4)),
            "qkv": parametrizations.weight_norm(nn.Linear(8, 24)),
            "rnn": parametrizations.weight_norm(nn.LSTM(8, 4), "weight_hh_l0"),
            "head": nn.Linear(8, 3),
        }
    )
    found = routes(model)
    layouts = {name.split(".")[0]: r.layout for name, r in found.items() if "original" in name and r.role == "matrix"}
    assert layouts == {
        "conv": MatrixLayout(blocks=2),
        "up": MatrixLayout(transposed=True),
        "stored": MatrixLayout(transposed=True),
        "qkv": MatrixLayout(blocks=3),
        "rnn": MatrixLayout(blocks=4),
    }


@pytest.mark.parametrize("parametrized", [parametrizations.weight_norm, old_weight_norm])
def test_a_parametrized_head_is_a_head(parametrized: Parametrized) -> None:
    by_order = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), parametrized(nn.Linear(8, 3)))
    by_name = nn.ModuleDict({"head": parametrized(nn.Linear(8, 3)), "body": nn.Linear(4, 8)})
    for model in (by_order, by_name):
        heads = [route for route in find_routes(model) if route.role == "head"]
        assert [route.shape for route in heads] == [(3, 8)]


def test_an_embedding_stays_one() -> None:
    found = routes(parametrizations.spectral_norm(nn.Embedding(5, 4)))
    assert found["parametrizations.weight.original"].role == "embedding"


class Symmetric(nn.Module):
    def forward(self, half: Tensor) -> Tensor:
        return half + half.mT


class Product(nn.Module):
    """Of two small factors, whose shapes are not that of the weight."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:, :2].clone(), weight[:2].clone()


def test_what_another_parametrization_makes_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    parametrizations.orthogonal(model[1])
    found = routes(model)
    for name, kind in (("0", "Symmetric"), ("1", "_Orthogonal")):
        route = found[f"{name}.parametrizations.weight.original"]
        assert (route.algorithm, route.confidence) == ("muon", "by name")
        assert route.reason == f"hidden matrix, parametrized by {kind}"


def test_factors_of_a_weight_are_a_guess_and_a_rule_matches_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Product())
    name = "0.parametrizations.weight.original0"
    with pytest.warns(UserWarning, match=rf"{name} \(4, 2\)"):
        assert routes(model)[name].confidence == "guess"
    with pytest.warns(UserWarning, match="original1"):
        assert routes(model, [Rule(name, "muon")])[name].algorithm == "muon"


def test_by_head_too() -> None:
    attention = nn.ModuleDict({name: parametrizations.weight_norm(nn.Linear(8, 8)) for name in ("q_proj", "k_proj")})
    vars(attention)["num_heads"] = 4
    model = nn.ModuleDict({"attention": attention, "head": nn.Linear(8, 3)})
    found = {route.name: route.layout for route in find_routes(model, per_head=True)}
    assert found["attention.q_proj.parametrizations.weight.original1"] == MatrixLayout(blocks=4)


def test_a_name_alone_is_no_parametrization() -> None:
    """No hook computes another parameter from it."""
    layer = nn.Linear(4, 8)
    layer.weight_v = nn.Parameter(torch.zeros(3, 5))
    with pytest.warns(UserWarning, match="weight_v"):
        assert routes(layer)["weight_v"].algorithm == "adamw"
