"""QDWH, ZOLO-PD and the singular value decomposition: polar factors to working precision."""

from collections.abc import Callable
from math import log10
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.orthogonalize import Orthogonalizer

METHODS: list[Orthogonalizer] = ["qdwh", "zolo_pd", "svd"]
Maker = Callable[[Tensor, int, int], Tensor]
Measure = Callable[[Tensor, Tensor], Any]
PROMISED = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 300), (300, 96), (1, 40), (40, 1)])
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [
        (torch.float32, 1.0),
        (torch.float32, 1e3),
        (torch.float32, 1e6),
        (torch.float64, 1.0),
        (torch.float64, 1e6),
        (torch.float64, 1e12),
    ],
)
def test_it_is_the_polar_factor(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    condition: float,
    method: Orthogonalizer,
    with_spectrum: Maker,
    polar_error: Measure,
) -> None:
    spectrum = torch.logspace(0, -log10(condition), min(rows, columns), dtype=torch.float64)
    matrix = with_spectrum(spectrum, rows, columns).to(dtype)
    error = polar_error(matrix, orthogonalize(matrix, method))
    assert error.orthogonality < PROMISED[dtype]
    assert error.backward < PROMISED[dtype]
    # A perturbation of one rounding moves the polar factor itself by up to about condition × epsilon.
    assert error.forward < 30 * condition * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", ["qdwh", "zolo_pd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_condition_beyond_the_precision_is_still_orthogonal_or_less(
    method: Orthogonalizer, dtype: torch.dtype, with_spectrum: Maker, polar_error: Measure
) -> None:
    """What rounding has left without meaning lands between zero and one, and the product with the matrix is right."""
    spectrum = torch.logspace(0, -20, 40, dtype=torch.float64)
    matrix = with_spectrum(spectrum, 40, 70).to(dtype)
    factor = orthogonalize(matrix, method)
    assert torch.linalg.matrix_norm(factor, 2) < 1 + PROMISED[dtype]
    assert polar_error(matrix, factor).backward < PROMISED[dtype]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(30, 30), (24, 60), (60, 24)])
def test_rank_deficient_matrices_are_isometries_on_their_row_space(
    method: Orthogonalizer, dtype: torch.dtype, rows: int, columns: int, with_spectrum: Maker, polar_error: Measure
) -> None:
    matrix = with_spectrum(torch.linspace(0.5, 1.0, 10, dtype=torch.float64), rows, columns).to(dtype)
    factor = orthogonalize(matrix, method)
    singular_values = torch.linalg.svdvals(factor)
    torch.testing.assert_close(singular_values[:10], torch.ones(10, dtype=dtype), atol=PROMISED[dtype], rtol=0)
    assert singular_values.max() < 1 + PROMISED[dtype]
    assert polar_error(matrix, factor).backward < PROMISED[dtype]


@pytest.mark.parametrize("method", ["qdwh", "zolo_pd"])
def test_a_higher_lower_bound_costs_fewer_steps_and_holds_above_itself(
    method: Orthogonalizer, with_spectrum: Maker, polar_error: Measure
) -> None:
    matrix = with_spectrum(torch.logspace(0, -2, 32, dtype=torch.float64), 32, 32)
    error = polar_error(matrix, orthogonalize(matrix, method, lower_bound=1e-3))
    assert error.orthogonality < 1e-13
    with pytest.raises(ValueError, match="lower_bound must lie between 1e-30 and 1, got 0"):
        orthogonalize(matrix, method, lower_bound=0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_refused_to_compute_in_but_taken_in(
    method: Orthogonalizer, dtype: str, polar_error: Measure
) -> None:
    matrix = torch.randn(12, 20)
    with pytest.raises(ValueError, match=f"does not run in dtype '{dtype}'; choose one of float64, float32"):
        orthogonalize(matrix, method, dtype=dtype)
    half = matrix.to(getattr(torch, dtype))
    factor = orthogonalize(half, method)
    assert factor.dtype == half.dtype
    assert polar_error(half, factor).forward < 4 * torch.finfo(half.dtype).eps
