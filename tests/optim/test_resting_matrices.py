"""A matrix whose gradient is exactly zero rests; live gradients, however small, take full steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import MatrixLayout, MuonAdamW

LR, MU = 0.01, 0.95
OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False},
    {"polar_first": True},
    {"neuron_beta": 0.9},
    {"update_scale": "nuclear_norm"},
    {"fixed_norm": 0.01},
    {"polar_first": True, "fixed_norm": 0.01},
    {"polar_first": True, "neuron_beta": 0.9, "update_scale": "nuclear_norm"},
    {"cautious_weight_decay": True},
    {"momentum_dtype": "bfloat16"},
    {"momentum_dtype": "int8"},
]
# A matrix, one expert of a stack, and one block of a fused weight of one shape and of several: the parameter's shape,
# its layout, and which of its elements get no gradient any more.
PLACES: dict[str, tuple[tuple[int, ...], MatrixLayout, Any]] = {
    "matrix": ((6, 4), MatrixLayout(), slice(None)),
    "expert": ((3, 6, 4), MatrixLayout(stacked=True), 1),
    "block": ((18, 4), MatrixLayout(blocks=3), slice(6, 12)),
    "block of another size": ((18, 4), MatrixLayout(split_sizes=(10, 4, 4)), slice(10, 14)),
}


def make(place: str = "matrix", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, MuonAdamW]:
    shape, layout, _ = PLACES[place]
    weight = torch.randn(shape, dtype=dtype)
    group = {"params": [weight], "algorithm": "muon", "layouts": [vars(layout)]}
    return weight, MuonAdamW([group], **{"lr": LR, "momentum": MU, "weight_decay": 0.0, **options})


def step(weight: Tensor, optimizer: MuonAdamW, gradient: Tensor, times: int = 1) -> None:
    weight.grad = gradient
    for _ in range(times):
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_without_gradient_nothing_moves(place: str, options: dict[str, Any]) -> None:
    weight, optimizer = make(place, **options)
    resting = PLACES[place][2]
    step(weight, optimizer, torch.randn_like(weight))
    before = weight.clone()
    gradient = torch.randn_like(weight)
    gradient[resting] = 0
    step(weight, optimizer, gradient, 5)
    assert torch.equal(weight[resting], before[resting])
    assert place == "matrix" or bool((weight != before).any())  # the others move


@pytest.mark.parametrize(
    "options", [*OPTIONS[:3], *(pytest.param(one, marks=pytest.mark.slow) for one in OPTIONS[3:7])], ids=str
)
def test_it_rests_for_ever_and_wakes_up(options: dict[str, Any]) -> None:
    """The momentum ends in 1500 steps (0.95¹⁵⁰⁰ = 4e-34); the first new gradient G moves W along −polar(G)."""
    weight, optimizer = make(**options)
    step(weight, optimizer, torch.randn_like(weight), 3)
    before = weight.clone()
    step(weight, optimizer, torch.zeros_like(weight), 1500)
    assert torch.equal(weight, before)
    gradient = torch.randn_like(weight)
    step(weight, optimizer, gradient)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    move, expected = before - weight, u @ vh
    if optimizer.param_groups[0]["fixed_norm"] is not None:  # along the sphere
        expected = expected - before * (before * expected).sum() / before.square().sum()
    if optimizer.param_groups[0]["neuron_beta"] is None:
        assert (move * expected).sum() > 0.95 * move.norm() * expected.norm()
    assert (move * gradient).sum() > 0


@pytest.mark.parametrize("options", [{}, {"polar_first": True}, {"cautious_weight_decay": True}], ids=str)
def test_it_decays_as_weights_do(options: dict[str, Any]) -> None:
    weight, optimizer = make(dtype=torch.float64, **options)
    step(weight, optimizer, torch.randn_like(weight))
    before = weight.clone()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    step(weight, optimizer, torch.zeros_like(weight), 1500)
    torch.testing.assert_close(weight, before * (1 - LR * 0.1) ** 1500, rtol=1e-10, atol=0)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("update_scale") != "nuclear_norm"], ids=str)
@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_steps_have_no_scale(options: dict[str, Any], size: float) -> None:
    """At 1e-30 and 1e30. The nuclear norm is that scale; with ``fixed_norm`` it has no effect."""
    moves = []
    for scale in (1.0, size):
        torch.manual_seed(0)
        scaled = {**options, "update_scale": "nuclear_norm"} if "fixed_norm" in options else options
        weight, optimizer = make("block of another size", **scaled)
        before = weight.clone()
        for _ in range(3):
            step(weight, optimizer, scale * torch.randn_like(weight))
        moves.append(weight - before)
    torch.testing.assert_close(moves[1], moves[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1e-200, 1e-300, 1e200])
@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_steps_have_no_scale_in_float64(size: float, method: str) -> None:
    """Squares of these underflow and overflow."""
    moves = []
    for scale in (1.0, size):
        torch.manual_seed(0)
        weight, optimizer = make("expert", torch.float64, orthogonalizer=method, neuron_beta=0.9)
        before = weight.clone()
        for _ in range(3):
            step(weight, optimizer, scale * torch.randn_like(weight))
        moves.append(weight - before)
    torch.testing.assert_close(moves[1], moves[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("polar_first", [False, True])
def test_momentum_that_underflows_leaves_the_weights_finite(polar_first: bool) -> None:
    """In float64 at μ = 0.5 it is below 1e-162 after 540 steps, and denormal after 1030."""
    weight, optimizer = make(dtype=torch.float64, momentum=0.5, polar_first=polar_first)
    step(weight, optimizer, torch.randn_like(weight))
    before = weight.clone()
    for times in (540, 560):
        step(weight, optimizer, torch.zeros_like(weight), times)
        assert torch.equal(weight, before)
    step(weight, optimizer, 1e-200 * torch.randn_like(weight))
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


def test_momentum_that_is_not_finite_stays_visible() -> None:
    weight, optimizer = make()
    gradient = torch.randn_like(weight)
    gradient[2, 1] = torch.nan
    optimizer.param_groups[0]["lr"] = 0.0
    step(weight, optimizer, gradient)
    optimizer.param_groups[0]["lr"] = LR
    step(weight, optimizer, torch.zeros_like(weight))
    assert weight.isnan().all()


def test_matrices_of_one_batch_rest_each_by_itself() -> None:
    weights = [torch.randn(4, 3) for _ in range(6)]
    optimizer = MuonAdamW([{"params": weights, "algorithm": "muon"}], weight_decay=0.0)
    before = [weight.clone() for weight in weights]
    for number in range(10):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight) * float(number == 0 or i % 2)
        if number == 1:
            before = [weight.clone() for weight in weights]
        optimizer.step()
    assert [torch.equal(*pair) for pair in zip(weights, before, strict=True)] == [True, False] * 3
