"""Newton–Schulz steps one by one and combined give the same factor, in every precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.newton_schulz import cheapest_runs
from lightning_muon.optim.polar.orthogonalize import Orthogonalizer
from lightning_muon.optim.polar.quintics import Quintic, quintics

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


def _step_by_step(matrix: Tensor, schedule: tuple[Quintic, ...]) -> Tensor:
    """The iteration as it is written down, in float64."""
    matrix = matrix / torch.linalg.matrix_norm(matrix)
    for a, b, c in schedule:
        gram = matrix @ matrix.mT
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return matrix


@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
@pytest.mark.parametrize("coefficients", ["keller_jordan", "polar_express"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4), ("float16", 2e-2), ("bfloat16", 8e-2)]
)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_is_the_iteration_as_written_down(
    spectrum: str,
    dtype: str,
    tolerance: float,
    coefficients: str,
    method: Orthogonalizer,
    with_spectrum: Callable[[Tensor, int, int], Tensor],
) -> None:
    matrix = with_spectrum(SPECTRA[spectrum].double(), ROWS, COLUMNS)
    # Both start from what the precision holds: singular values below its rounding are not the iteration's concern.
    matrix = (matrix / torch.linalg.matrix_norm(matrix)).to(getattr(torch, dtype)).double()
    expected = _step_by_step(matrix, quintics(coefficients, 5))
    factor = orthogonalize(matrix, method, coefficients=coefficients, dtype=dtype)
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
    expected = orthogonalize(matrix, "polar_express", restart_every=1, **options)
    factor = orthogonalize(matrix, "polar_express", restart_every=3, dtype=dtype, **options)
    torch.testing.assert_close(factor, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
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
        runs = cheapest_runs(quintics(coefficients, 5), 5, ROWS, 100 * ROWS, torch.finfo(dtype).eps)
        return [len(run) for run in runs]

    # In float16 and with Polar Express the authors restart after two of five steps.
    assert lengths("polar_express", torch.float16) == [2, 3]
    assert lengths("keller_jordan", torch.float16) == [3, 2]
    assert lengths("keller_jordan", torch.float64) == [5]
    assert lengths("keller_jordan", torch.bfloat16) == [2, 2, 1]


def test_it_saves_work_on_long_matrices_and_adds_none_on_square_ones() -> None:
    def flops(method: Orthogonalizer, columns: int, **options: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(ROWS, columns), method, dtype="float32", **options)
        return int(counter.get_total_flops())

    cube = ROWS**3
    assert flops("newton_schulz", ROWS) == flops("gram_newton_schulz", ROWS) == 5 * 6 * cube
    assert flops("newton_schulz", 4 * ROWS) == 2 * (16 + 10) * cube + 18 * cube  # instead of 5 · 18
    assert flops("gram_newton_schulz", 4 * ROWS) == (16 + 18) * cube + (16 + 10) * cube
    express = [flops("polar_express", 4 * ROWS, restart_every=longest) for longest in (1, 2, 3)]
    assert express[2] < express[1] < express[0]
    assert flops("polar_express", ROWS) == 5 * 6 * cube


def test_no_steps_between_restarts_are_refused() -> None:
    for method in ("gram_newton_schulz", "polar_express"):
        with pytest.raises(ValueError, match="restart_every must be at least 1, got 0"):
            orthogonalize(torch.ones(3, 30), method, restart_every=0)
