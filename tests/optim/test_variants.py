"""PolarGrad, NorMuon and cautious weight decay, against their papers' formulas in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.optim.update.cautious import decaying

SHAPES = [(6, 10), (10, 6), (8, 8)]
LR, DECAY, MOMENTUM, BETA = 0.1, 0.05, 0.9, 0.8
EXACT = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "orthogonalizer": "svd", "nesterov": False}

State = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, State], Tensor]


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factor, and the nuclear norm."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh, s.sum()


def average(state: State, key: str, value: Tensor, beta: float) -> Tensor:
    state[key] = beta * state.get(key, torch.zeros_like(value)) + (1 - beta) * value
    return state[key]


def follow(shape: tuple[int, int], options: dict[str, Any], rule: Rule, steps: int = 5) -> tuple[Tensor, Tensor]:
    """A weight after some steps of ours, and of a rule that gives the new weight from the old and the gradient."""
    torch.manual_seed(3)
    start, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(steps, *shape, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), start.clone()
    state: State = {}
    optimizer = MuonAdamW([{"params": [ours], "algorithm": "muon"}], **{**EXACT, **options})
    for gradient in gradients:
        ours.grad = gradient.clone()
        optimizer.step()
        theirs = rule(theirs, gradient, state)
    return ours.detach(), theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_polargrad_scales_by_the_nuclear_norm_of_the_momentum(shape: tuple[int, int]) -> None:
    def rule(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
        factor, norm = polar(average(state, "m", gradient, MOMENTUM))
        return (1 - LR * DECAY) * weight - LR * norm * factor

    ours, theirs = follow(shape, {"update_scale": "nuclear_norm"}, rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_first_averages_factors_and_scales_by_the_gradient(shape: tuple[int, int]) -> None:
    def rule(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
        factor, norm = polar(gradient)
        return (1 - LR * DECAY) * weight - LR * norm * average(state, "m", factor, MOMENTUM)

    ours, theirs = follow(shape, {"update_scale": "nuclear_norm", "polar_first": True}, rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_first_with_nesterov_looks_ahead_along_the_factors(shape: tuple[int, int]) -> None:
    def rule(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
        factor, _ = polar(gradient)
        ahead = (1 - MOMENTUM) * factor + MOMENTUM * average(state, "m", factor, MOMENTUM)
        return (1 - LR * DECAY) * weight - LR * ahead

    ours, theirs = follow(shape, {"update_scale": "none", "polar_first": True, "nesterov": True}, rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_is_algorithm_1_of_its_paper(shape: tuple[int, int]) -> None:
    """η̂ = 0.2 η √(mn) / ‖Ô‖: under Moonlight's scale the update has an RMS of 0.2 exactly."""

    def rule(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
        factor, _ = polar(average(state, "m", gradient, MOMENTUM))
        mean_square = average(state, "v", factor.square().mean(dim=1, keepdim=True), BETA)
        normalized = factor / (mean_square.sqrt() + 1e-8)
        size = 0.2 * (shape[0] * shape[1]) ** 0.5 / normalized.norm()
        return (1 - LR * DECAY) * weight - LR * size * normalized

    ours, theirs = follow(shape, {"update_scale": "moonlight", "neuron_beta": BETA}, rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_normuon_takes_columns_for_neurons_where_the_weight_is_stored_in_out() -> None:
    """The same layer stored both ways goes the same way."""
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 9), torch.randn(4, 6, 9)
    layouts = [{"stacked": False, "blocks": 1, "transposed": transposed} for transposed in (False, True)]
    ways = [nn.Parameter(start.clone()), nn.Parameter(start.mT.clone())]
    for weight, layout, turn in zip(ways, layouts, (lambda g: g, lambda g: g.mT), strict=True):
        group = {"params": [weight], "algorithm": "muon", "layouts": [layout]}
        optimizer = MuonAdamW([group], lr=0.1, neuron_beta=BETA, update_scale="mup")
        for gradient in gradients:
            weight.grad = turn(gradient).contiguous()
            optimizer.step()
    torch.testing.assert_close(ways[0].detach(), ways[1].detach().mT, rtol=1e-4, atol=1e-4)


def test_normuon_gives_every_neuron_the_same_share() -> None:
    """Rows of very different sizes in a polar factor come out alike."""
    gradient = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0])) @ torch.randn(4, 50)
    gradient[0] *= 100
    gradient[1] = gradient[0] + 0.01 * gradient[1]
    moved = {}
    for beta in (None, 0.95):
        weight = nn.Parameter(torch.zeros(4, 50))
        weight.grad = gradient.clone()
        MuonAdamW([{"params": [weight], "algorithm": "muon"}], neuron_beta=beta, weight_decay=0.0).step()
        norms = weight.detach().norm(dim=1)
        moved[beta] = float(norms.max() / norms.min())
    assert moved[0.95] == pytest.approx(1.0, rel=1e-3)
    assert moved[None] > 1.05


@pytest.mark.parametrize("shape", SHAPES)
def test_cautious_decay_spares_what_the_step_pushes_outwards(shape: tuple[int, int]) -> None:
    def rule(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
        factor, _ = polar(average(state, "m", gradient, MOMENTUM))
        return weight - LR * DECAY * weight * (factor * weight >= 0) - LR * factor

    ours, theirs = follow(shape, {"update_scale": "none", "cautious_weight_decay": True}, rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_elsewhere_than_on_a_cpu_the_same_weights_decay() -> None:
    """There few operations on all tensors take the place of three on each."""

    class ElsewhereTensor(torch.Tensor):
        is_cpu = False

    torch.manual_seed(0)
    weights, steps = ([torch.randn(5, 4), torch.randn(3)] for _ in range(2))
    steps[0][0] = 0
    weights[0][:, 0] = 0
    expected = decaying(weights, steps)
    found = decaying([weight.as_subclass(ElsewhereTensor) for weight in weights], steps)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own.as_subclass(torch.Tensor), other)


def test_cautious_decay_in_adamw_groups() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(50), torch.randn(50)
    plain, cautious, free = (nn.Parameter(start.clone()) for _ in range(3))
    for weight, decay, careful in ((plain, 0.1, False), (cautious, 0.1, True), (free, 0.0, False)):
        weight.grad = gradient.clone()
        group = {"params": [weight], "algorithm": "adamw"}
        MuonAdamW([group], lr=0.1, weight_decay=decay, cautious_weight_decay=careful).step()
    inwards = (start - free.detach()) * start >= 0
    expected = free.detach() - 0.01 * start * inwards
    torch.testing.assert_close(cautious.detach(), expected)
    torch.testing.assert_close(cautious.detach()[inwards], plain.detach()[inwards])
    assert 0 < inwards.sum() < 50


ALL: dict[str, list[Any]] = {
    "update_scale": ["moonlight", "nuclear_norm"],
    "polar_first": [False, True],
    "neuron_beta": [None, 0.95],
    "cautious_weight_decay": [False, True],
    "nesterov": [False, True],
    "orthogonalizer": ["newton_schulz", "svd"],
}


@pytest.mark.parametrize("values", itertools.product(*ALL.values()), ids=str)
def test_all_options_combine_and_resume(values: tuple[Any, ...]) -> None:
    options = dict(zip(ALL, values, strict=True))

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 2))

    def train(network: nn.Module, optimizer: MuonAdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.randn(5, 2, 4, 4, generator=generator)).square().mean().backward()
            optimizer.step()

    straight, resumed = model(), model()
    optimizer = MuonAdamW(route_parameters(straight), lr=0.01, **options)
    train(straight, optimizer, 1)
    train(straight, optimizer, 2)
    first = MuonAdamW(route_parameters(resumed), lr=0.01, **options)
    train(resumed, first, 1)
    second = MuonAdamW(route_parameters(resumed))
    second.load_state_dict(first.state_dict())
    train(resumed, second, 2)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("elements", [1, 100, 10**9])
def test_the_bound_of_a_batch_changes_nothing(elements: int) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(7)] + [nn.Linear(8, 2)])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    MuonAdamW(route_parameters(model), batch_elements=elements, orthogonalizer="svd", weight_decay=0.0, lr=1.0).step()
    for parameter, old in list(zip(model.parameters(), before, strict=True))[:7]:
        factor, _ = polar(parameter.grad)
        torch.testing.assert_close(old - parameter, 0.2 * 8**0.5 * factor, atol=1e-4, rtol=0)


def test_a_state_dict_from_before_an_option_existed_loads() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    saved = MuonAdamW([{"params": [weight], "algorithm": "muon"}]).state_dict()
    for option in ("polar_first", "neuron_beta"):
        del saved["param_groups"][0][option]
    optimizer = MuonAdamW([{"params": [weight], "algorithm": "muon"}])
    optimizer.load_state_dict(saved)
    weight.grad = torch.randn(4, 4)
    optimizer.step()
