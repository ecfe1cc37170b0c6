"""Polar Express: its quintics are optimal, equal the published ones, and reach the documented error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.quintics import closest_to_one, optimal_composition

# The list in the code of https://arxiv.org/abs/2505.16932, before its safety factor.
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def test_the_coefficients_are_the_published_ones() -> None:
    computed = torch.tensor(optimal_composition(8, lower_bound=1e-3, safety=1.0), dtype=torch.float64)
    torch.testing.assert_close(computed, torch.tensor(PUBLISHED, dtype=torch.float64), rtol=1e-9, atol=1e-8)


def test_every_quintic_but_the_last_has_the_safety_factor() -> None:
    *early, last = optimal_composition(5)
    *plain, plain_last = optimal_composition(5, safety=1.0)
    assert last == plain_last
    for (a, b, c), (plain_a, plain_b, plain_c) in zip(early, plain, strict=True):
        assert (a, b, c) == pytest.approx((plain_a / 1.01, plain_b / 1.01**3, plain_c / 1.01**5))


@pytest.mark.parametrize(("lower", "upper"), [(0.03, 1.0), (0.3, 1.7), (0.9, 1.1)])
def test_a_quintic_closest_to_one_equioscillates(lower: float, upper: float) -> None:
    """Four alternations of the largest error for three coefficients: the mark of the best approximation."""
    a, b, c = closest_to_one(lower, upper)
    x = torch.linspace(lower, upper, 100_001, dtype=torch.float64)
    error = a * x + b * x**3 + c * x**5 - 1
    turns = (error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) < 0
    extrema = torch.cat([error[:1], error[1:-1][turns], error[-1:]])
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(extrema, signs * extrema.abs().max(), rtol=1e-6, atol=1e-12)


def test_it_is_the_composition_on_each_singular_value_over_the_schatten_norm(
    with_spectrum: Callable[[Tensor, int, int], Tensor],
) -> None:
    spectrum = torch.tensor([1.0, 0.9, 0.5, 1e-2, 1e-5], dtype=torch.float64)
    expected = spectrum / spectrum.pow(8).sum() ** (1 / 8)
    for a, b, c in optimal_composition(4, lower_bound=1e-2):
        expected = a * expected + b * expected**3 + c * expected**5
    factor = orthogonalize(with_spectrum(spectrum, 7, 9), "polar_express", steps=4, lower_bound=1e-2)
    measured = torch.linalg.svdvals(factor)[:5]
    torch.testing.assert_close(measured, expected.sort(descending=True).values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("steps", "largest"), [(5, 0.16), (6, 5e-3), (7, 1e-5), (8, 1e-5)])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (200, 48)])
def test_singular_values_down_to_a_thousandth_of_the_norm_arrive_at_one(
    steps: int, largest: float, rows: int, columns: int, with_spectrum: Callable[[Tensor, int, int], Tensor]
) -> None:
    spectrum = torch.logspace(0, -2, min(rows, columns), dtype=torch.float64)
    spectrum[-1] = 1e-3 * spectrum.pow(8).sum() ** (1 / 8)
    matrix = with_spectrum(spectrum, rows, columns).float()
    singular_values = torch.linalg.svdvals(orthogonalize(matrix, "polar_express", steps=steps))
    assert (singular_values - 1).abs().max() < largest


def test_a_higher_lower_bound_arrives_sooner(with_spectrum: Callable[[Tensor, int, int], Tensor]) -> None:
    matrix = with_spectrum(torch.linspace(0.5, 1, 4, dtype=torch.float64), 4, 8)
    distances = [
        float((torch.linalg.svdvals(orthogonalize(matrix, "polar_express", lower_bound=bound)) - 1).abs().max())
        for bound in (1e-3, 1e-1)
    ]
    assert distances[1] < distances[0] / 100


@pytest.mark.parametrize(("rows", "columns"), [(96, 160), (256, 256)])
def test_eight_steps_are_within_a_hundredth_of_the_polar_factor(
    rows: int,
    columns: int,
    with_spectrum: Callable[[Tensor, int, int], Tensor],
    polar_factor: Callable[[Tensor], Tensor],
) -> None:
    matrix = with_spectrum(torch.logspace(0, -3, rows, dtype=torch.float64), rows, columns).float()
    error = orthogonalize(matrix, "polar_express", steps=8).double() - polar_factor(matrix)
    assert torch.linalg.matrix_norm(error, 2) < 1e-2


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (128, 512)])
@pytest.mark.parametrize("gaussian", [True, False])
def test_four_steps_are_closer_to_orthogonal_than_five_of_the_classic_quintic(
    gaussian: bool, rows: int, columns: int, with_spectrum: Callable[[Tensor, int, int], Tensor]
) -> None:
    spectrum = torch.logspace(0, -3, rows, dtype=torch.float64)
    matrix = torch.randn(rows, columns) if gaussian else with_spectrum(spectrum, rows, columns).float()
    classic, ours = orthogonalize(matrix), orthogonalize(matrix, "polar_express", steps=4, lower_bound=1e-2)
    errors = [torch.linalg.matrix_norm(factor @ factor.mT - torch.eye(rows)) for factor in (ours, classic)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("singular_value", [1.0, 1e-2, 1e-4])
def test_half_precision_does_not_push_singular_values_off_the_interval(
    dtype: torch.dtype, singular_value: float, with_spectrum: Callable[[Tensor, int, int], Tensor]
) -> None:
    """Above the interval a quintic grows fast; without the safety factor rounding would take it there."""
    spectrum = torch.cat([torch.ones(1), torch.full((31,), singular_value)]).double()
    factor = orthogonalize(with_spectrum(spectrum, 32, 96), "polar_express", steps=8, dtype=dtype)
    assert torch.linalg.matrix_norm(factor, 2) < 1.05


@pytest.mark.parametrize("lower_bound", [0.0, 1.0, -1e-3])
def test_a_lower_bound_outside_of_0_and_1_is_refused(lower_bound: float) -> None:
    with pytest.raises(ValueError, match=f"lower_bound must lie between 1e-30 and 1, got {lower_bound}"):
        orthogonalize(torch.ones(3, 3), "polar_express", lower_bound=lower_bound)
