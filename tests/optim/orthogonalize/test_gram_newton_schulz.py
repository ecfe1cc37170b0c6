"""Gram Newton–Schulz: the same factor as Newton–Schulz, in every precision that it accepts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.gram_newton_schulz import runs_between_restarts
from lightning_muon.optim.newton_schulz import quintics
from lightning_muon.optim.orthogonalize import Orthogonalizer

ROWS, COLUMNS = 48, 192
SPECTRA = {
    "gaussian-like": torch.linspace(0.1, 1.0, ROWS),
    "condition 1e3": torch.logspace(0, -3, ROWS),
    "condition 1e12": torch.logspace(0, -12, ROWS),
    "rank 1": torch.ones(1),
    "rank deficient": torch.ones(ROWS // 2),
    "one dominates": torch.cat([torch.ones(1), torch.full((ROWS - 1,), 1e-4)]),
    "one dominates all": torch.cat([torch.ones(1), torch.full((ROWS - 1,), 1e-7)]),
}


@pytest.mark.parametrize("coefficients", ["keller_jordan", "polar_express"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4), ("float16", 2e-2)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_equals_newton_schulz(
    spectrum: str,
    dtype: str,
    tolerance: float,
    coefficients: str,
    with_spectrum: Callable[[Tensor, int, int], Tensor],
) -> None:
    matrix = with_spectrum(SPECTRA[spectrum].double(), ROWS, COLUMNS)
    # Both start from what the precision holds: singular values below its rounding are not the iteration's concern.
    matrix = (matrix / torch.linalg.matrix_norm(matrix)).to(getattr(torch, dtype)).double()
    expected = orthogonalize(matrix, coefficients=coefficients)
    factor = orthogonalize(matrix, "gram_newton_schulz", coefficients=coefficients, dtype=dtype)
    torch.testing.assert_close(factor, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4), ("float16", 3e-2)])
@pytest.mark.parametrize("options", [{"steps": 3, "lower_bound": 0.03}, {"steps": 1}, {"steps": 5}])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_polar_express_on_the_gram_matrix_equals_itself(
    spectrum: str,
    options: dict[str, Any],
    dtype: str,
    tolerance: float,
    with_spectrum: Callable[[Tensor, int, int], Tensor],
) -> None:
    matrix = with_spectrum(SPECTRA[spectrum].double(), ROWS, COLUMNS)
    matrix = (matrix / torch.linalg.matrix_norm(matrix)).to(getattr(torch, dtype)).double()
    expected = orthogonalize(matrix, "polar_express", **options)
    factor = orthogonalize(matrix, "polar_express", gram=True, dtype=dtype, **options)
    torch.testing.assert_close(factor, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("coefficients", ["keller_jordan", "polar_express"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_stays_bounded_when_no_restart_is_asked_for(
    spectrum: str, coefficients: str, dtype: str, with_spectrum: Callable[[Tensor, int, int], Tensor]
) -> None:
    matrix = with_spectrum(SPECTRA[spectrum].double(), ROWS, COLUMNS)
    options: dict[str, Any] = {"coefficients": coefficients, "dtype": dtype, "steps": 10, "restart_every": 10}
    assert torch.linalg.matrix_norm(orthogonalize(matrix, "gram_newton_schulz", **options), 2) < 1.25


def test_the_precision_decides_how_soon_it_restarts() -> None:
    def lengths(coefficients: str, dtype: torch.dtype) -> list[int]:
        runs = runs_between_restarts(quintics(coefficients, 5), 5, torch.finfo(dtype).eps)
        return [len(run) for run in runs]

    # In float16 and with Polar Express the authors restart after two of five steps.
    assert lengths("polar_express", torch.float16) == [2, 3]
    assert lengths("keller_jordan", torch.float16) == [3, 2]
    assert lengths("keller_jordan", torch.float64) == [5]


def test_it_saves_work_on_long_matrices_and_adds_none_on_square_ones() -> None:
    def flops(method: Orthogonalizer, columns: int, **options: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(ROWS, columns), method, **options)
        return int(counter.get_total_flops())

    assert flops("gram_newton_schulz", 4 * ROWS) < 0.7 * flops("newton_schulz", 4 * ROWS)
    assert flops("gram_newton_schulz", ROWS) == flops("newton_schulz", ROWS)
    assert flops("polar_express", 4 * ROWS, gram=True) < 0.7 * flops("polar_express", 4 * ROWS)
    assert flops("polar_express", ROWS, gram=True) == flops("polar_express", ROWS)


def test_bfloat16_and_no_steps_between_restarts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not run in dtype 'bfloat16'; choose one of float64, float32, float16"):
        orthogonalize(torch.ones(3, 30), "gram_newton_schulz", dtype="bfloat16")
    with pytest.raises(ValueError, match="gram does not run in bfloat16, the default on CUDA; set dtype to 'float16'"):
        orthogonalize(torch.ones(3, 30), "polar_express", gram=True, dtype="bfloat16")
    with pytest.raises(ValueError, match="restart_every must be at least 1, got 0"):
        orthogonalize(torch.ones(3, 30), "gram_newton_schulz", restart_every=0)
