"""The published update scales."""

import math
from typing import Any

import pytest
import torch

from lightning_muon.optim import MuonAdamW, orthogonalize, scale_factor
from lightning_muon.optim.update.scale import nuclear_norm

SCALES = {
    "none": lambda _out, _in: 1.0,
    "keller_jordan": lambda out, fan_in: math.sqrt(max(1, out / fan_in)),
    "mup": lambda out, fan_in: math.sqrt(out / fan_in),
    "moonlight": lambda out, fan_in: 0.2 * math.sqrt(max(out, fan_in)),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize(("fan_out", "fan_in"), [(8, 8), (8, 32), (32, 8), (1, 9)])
def test_formula(name: str, fan_out: int, fan_in: int) -> None:
    assert scale_factor(name, fan_out, fan_in) == pytest.approx(SCALES[name](fan_out, fan_in))


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize(
    ("shape", "layout", "fan_out", "fan_in"),
    [
        ((8, 32), {}, 8, 32),
        ((32, 8), {}, 32, 8),
        ((32, 8), {"transposed": True}, 8, 32),
        ((24, 8), {"blocks": 3}, 8, 8),
        ((3, 16, 8), {"stacked": True}, 16, 8),
        ((16, 4, 3, 3), {}, 16, 36),
    ],
)
def test_a_step_moves_by_lr_times_scale_times_polar_factor(
    name: str, shape: tuple[int, ...], layout: dict[str, int], fan_out: int, fan_in: int
) -> None:
    weight = torch.nn.Parameter(torch.randn(shape))
    weight.grad = torch.randn(shape)
    before = weight.detach().clone()
    layout = {"stacked": False, "blocks": 1, "transposed": False, **layout}
    group = {"params": [weight], "algorithm": "muon", "layouts": [layout]}
    MuonAdamW([group], lr=0.1, weight_decay=0.0, update_scale=name).step()
    from lightning_muon.optim import MatrixLayout

    view = MatrixLayout(**layout)
    factor = view.restore([orthogonalize(matrices) for matrices in view.matrices(weight.grad)], shape)
    torch.testing.assert_close(before - weight, 0.1 * SCALES[name](fan_out, fan_in) * factor, atol=1e-5, rtol=1e-5)


def test_moonlight_matches_the_rms_of_adamw() -> None:
    """An update by an exact polar factor has an RMS of 0.2 on every shape."""
    for shape in [(16, 64), (64, 16), (32, 32)]:
        factor = orthogonalize(torch.randn(shape), "svd")
        assert (scale_factor("moonlight", *shape) * factor).square().mean().sqrt() == pytest.approx(0.2, rel=1e-4)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown update_scale 'kj'; choose one of none, keller_jordan, mup, moonlight"
    ):
        scale_factor("kj", 1, 1)


def twice(fan_out: int, fan_in: int) -> float:
    return 2.0 * fan_out / fan_in


def returns_nothing(fan_out: int, fan_in: int) -> None:
    """Forget the result."""


@pytest.mark.parametrize("scale", [twice, f"{__name__}.twice"])
def test_a_function_of_the_user_gets_the_fans_of_the_layer(scale: Any) -> None:
    assert scale_factor(scale, 6, 3) == 4.0
    weights = [torch.nn.Parameter(torch.zeros(6, 3)), torch.nn.Parameter(torch.zeros(4, 8))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    factors = [orthogonalize(weight.grad) for weight in weights]
    MuonAdamW([{"params": weights, "algorithm": "muon"}], lr=0.1, update_scale=scale).step()
    torch.testing.assert_close(-weights[0].data, 0.1 * 4.0 * factors[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(-weights[1].data, 0.1 * 1.0 * factors[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, "1", None, True, torch.tensor(1.0)])
def test_what_it_returns_must_be_a_finite_positive_number(bad: object) -> None:
    with pytest.raises(ValueError, match=r"must return a finite positive number, got .* for fan-out 6 and fan-in 3"):
        scale_factor(lambda _out, _in: bad, 6, 3)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("keler_jordan", "unknown update_scale 'keler_jordan'; choose one of none, .*; did you mean 'keller_jordan'?"),
        (f"{__name__}.thrice", f"update_scale '{__name__}.thrice' cannot be imported: .*no attribute 'thrice'"),
        ("nowhere.to_be_found", "'nowhere.to_be_found' cannot be imported: No module named 'nowhere'"),
        (f"{__name__}.SCALES", "SCALES' is not a function, but dict"),
        (2.0, "update_scale must be one of none, .*, or a function or the import path of one; got 2.0"),
        ([], r"update_scale must be one of none, .* got \[\]"),
    ],
)
def test_what_is_no_scale_is_refused_when_the_optimizer_is_made(scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_factor(scale, 6, 3)
    group = {"params": [torch.nn.Parameter(torch.zeros(6, 3))], "algorithm": "muon", "name": "mine"}
    with pytest.raises(ValueError, match=f"mine.*{message}"):
        MuonAdamW([group], update_scale=scale)


def test_the_scale_of_a_shape_that_no_layer_has_is_not_asked_for() -> None:
    """As one that is zero for a single neuron."""
    weight = torch.nn.Parameter(torch.zeros(6, 3))
    MuonAdamW([{"params": [weight], "algorithm": "muon"}], update_scale=lambda out, _: math.log(out))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.bfloat16, 5e-7), (torch.float64, 1e-14)]
)
@pytest.mark.parametrize("shape", [(2, 1024, 1024), (2, 512, 2048), (3, 2048, 512), (5, 1, 4096), (5, 4096, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_nuclear_norm_loses_no_digits_and_is_the_same_alone_and_in_a_batch(
    shape: tuple[int, ...], transposed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """⟨A, O⟩ against a sum in float64. One long sum in float32 was wrong in the third digit."""
    matrices = torch.randn(shape).to(dtype)
    factors = (matrices.float() / shape[1] ** 0.5 + 0.01 * torch.randn(shape)).to(dtype)
    if transposed:
        matrices, factors = matrices.mT, factors.mT
    norms = nuclear_norm(matrices, factors)
    assert norms.shape == (shape[0], 1, 1)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    exact = (matrices.double() * factors.double()).flatten(1).sum(1).view(-1, 1, 1)
    torch.testing.assert_close(norms.double(), exact, rtol=tolerance, atol=0)
    for index in range(shape[0]):
        alone = nuclear_norm(matrices[index : index + 1], factors[index : index + 1])
        assert torch.equal(alone[0], norms[index])


def test_the_nuclear_norm_is_the_sum_of_singular_values() -> None:
    matrices = torch.randn(3, 20, 50)
    expected = torch.linalg.svdvals(matrices.double()).sum(-1).float().view(-1, 1, 1)
    for size in (1e-30, 1.0, 1e30):
        norms = nuclear_norm(size * matrices, orthogonalize(matrices, "svd"))
        torch.testing.assert_close(norms / size, expected, rtol=1e-6, atol=0)
