"""The effect of the Newton–Schulz polynomials on singular values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.orthogonalize import Orthogonalizer

SHAPES = [(64, 64), (32, 128), (128, 32), (1, 50), (50, 1), (1, 1)]
# The band in which five steps of the classic quintic leave singular values that were not tiny.
BAND = (0.65, 1.2)
Maker = Callable[[Tensor, int, int], Tensor]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_come_into_the_published_band(
    rows: int, columns: int, dtype: torch.dtype, with_spectrum: Maker
) -> None:
    spectrum = torch.linspace(0.1, 1.0, min(rows, columns), dtype=torch.float64)
    matrix = with_spectrum(spectrum, rows, columns)
    factor = orthogonalize(matrix.to(dtype))
    assert factor.dtype == dtype
    assert factor.shape == matrix.shape
    singular_values = torch.linalg.svdvals(factor.double())
    assert singular_values.min() > BAND[0]
    assert singular_values.max() < BAND[1]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_vectors_stay(rows: int, columns: int, polar_factor: Callable[[Tensor], Tensor]) -> None:
    """The quintic changes singular values only, so Oᵀ polar(A) is symmetric and positive definite."""
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    factor = orthogonalize(matrix, steps=5)
    small = factor @ polar_factor(matrix).mT if rows <= columns else factor.mT @ polar_factor(matrix)
    torch.testing.assert_close(small, small.mT, atol=1e-10, rtol=0)
    assert torch.linalg.eigvalsh(small).min() > 0


@pytest.mark.parametrize(
    ("coefficients", "quintics"),
    [
        ("keller_jordan", [(3.4445, -4.7750, 2.0315)] * 5),
        ([2.0, -1.5, 0.5], [(2.0, -1.5, 0.5)] * 5),
        ([[3.0, -3.2, 1.2], [2.0, -1.5, 0.5]], [(3.0, -3.2, 1.2), *[(2.0, -1.5, 0.5)] * 4]),
        ("cubic", [(1.5, -0.5, 0.0)] * 5),
    ],
)
def test_it_is_the_polynomial_of_each_step_on_each_singular_value(
    coefficients: str | list[float] | list[list[float]],
    quintics: list[tuple[float, float, float]],
    with_spectrum: Maker,
) -> None:
    spectrum = torch.tensor([1.0, 0.5, 0.1, 1e-3, 1e-6], dtype=torch.float64)
    matrix = with_spectrum(spectrum, 8, 12)
    expected = spectrum / spectrum.norm()
    for a, b, c in quintics:
        expected = a * expected + b * expected**3 + c * expected**5
    measured = torch.linalg.svdvals(orthogonalize(matrix, steps=5, coefficients=coefficients))[:5]
    torch.testing.assert_close(measured, expected.sort(descending=True).values, rtol=1e-9, atol=1e-12)


def test_the_cubic_converges_to_the_polar_factor(polar_factor: Callable[[Tensor], Tensor]) -> None:
    matrix = torch.randn(10, 30, dtype=torch.float64)
    cubic = orthogonalize(matrix, steps=30, coefficients="cubic")
    torch.testing.assert_close(cubic, polar_factor(matrix), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": "quartic"}, "'quartic'; choose one of keller_jordan, cubic, modded_nanogpt, modula"),
        ({"coefficients": [1.5, -0.5]}, r"three numbers a, b, c, or a list of such triples, got \[1.5, -0.5\]"),
        ({"coefficients": [[1.5, -0.5, 0.0], 1.0]}, "three numbers"),
        ({"coefficients": [[1.5, -0.5, 0.0]] * 3, "steps": 2}, "3 triples for 2 steps"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
def test_bad_options_are_refused(method: Orthogonalizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(torch.ones(3, 30), method, **options)
