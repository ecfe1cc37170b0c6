"""The polar factors, against the singular value decomposition in float64."""

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import orthogonalize

SHAPES = [(64, 64), (32, 128), (128, 32), (1, 50), (50, 1), (1, 1)]
# The band in which five steps of the classic quintic leave singular values that were not tiny.
BAND = (0.65, 1.2)


def with_spectrum(singular_values: Tensor, rows: int, columns: int) -> Tensor:
    """Return a random matrix of float64 with these singular values."""
    rank = len(singular_values)
    u = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64)).Q
    return u * singular_values @ v.mT


def polar_factor(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_newton_schulz_brings_singular_values_into_the_published_band(
    rows: int, columns: int, dtype: torch.dtype
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
def test_newton_schulz_keeps_the_singular_vectors(rows: int, columns: int) -> None:
    """The quintic changes singular values only, so Oᵀ polar(A) is symmetric and positive definite."""
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    product = orthogonalize(matrix, steps=5) @ polar_factor(matrix).mT
    small = product if rows <= columns else orthogonalize(matrix, steps=5).mT @ polar_factor(matrix)
    torch.testing.assert_close(small, small.mT, atol=1e-10, rtol=0)
    assert torch.linalg.eigvalsh(small).min() > 0


def test_newton_schulz_is_the_quintic_on_each_singular_value() -> None:
    spectrum = torch.tensor([1.0, 0.5, 0.1, 1e-3, 1e-6], dtype=torch.float64)
    matrix = with_spectrum(spectrum, 8, 12)
    expected = spectrum / spectrum.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    measured = torch.linalg.svdvals(orthogonalize(matrix))[:5]
    torch.testing.assert_close(measured, expected.sort(descending=True).values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_svd_is_the_polar_factor(condition: float) -> None:
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), 16, dtype=torch.float64)
    matrix = with_spectrum(spectrum, 24, 16)
    torch.testing.assert_close(orthogonalize(matrix, "svd"), polar_factor(matrix), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_the_size_of_the_entries_does_not_matter(method: str, size: float) -> None:
    matrix = torch.randn(12, 20)
    torch.testing.assert_close(orthogonalize(matrix * size, method), orthogonalize(matrix, method), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_zero_gives_zero_and_low_rank_stays_finite(method: str) -> None:
    batch = torch.zeros(3, 8, 16)
    batch[1] = torch.outer(torch.randn(8), torch.randn(16))
    batch[2] = torch.randn(8, 16)
    factor = orthogonalize(batch, method)
    assert factor[0].count_nonzero() == 0
    assert factor.isfinite().all()
    assert BAND[0] < torch.linalg.matrix_norm(factor[1], 2) < BAND[1]


@pytest.mark.parametrize("shape", [(5, 6, 10), (2, 3, 10, 6), (1, 1, 4, 4)])
def test_a_batch_is_each_matrix_by_itself(shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    flat = batch.reshape(-1, *shape[-2:])
    expected = torch.stack([orthogonalize(matrix) for matrix in flat]).reshape(shape)
    torch.testing.assert_close(orthogonalize(batch), expected, atol=1e-5, rtol=1e-5)


def test_the_input_is_left_alone() -> None:
    matrix = torch.randn(6, 6)
    before = matrix.clone()
    orthogonalize(matrix)
    assert torch.equal(matrix, before)


def test_steps_coefficients_and_precision_can_be_chosen() -> None:
    matrix = torch.randn(10, 30)
    cubic = orthogonalize(matrix.double(), steps=30, coefficients=(1.5, -0.5, 0.0))
    torch.testing.assert_close(cubic, polar_factor(matrix), atol=1e-9, rtol=0)
    coarse = orthogonalize(matrix, dtype=torch.bfloat16)
    assert 1e-4 < (coarse - orthogonalize(matrix)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), "newton_schulz"), r"shape \(\.\.\., m, n\), got \(3,\)"),
        ((torch.zeros(3, 3, dtype=torch.int64), "newton_schulz"), "int64"),
        ((torch.zeros(3, 3), "newton"), "unknown orthogonalizer 'newton'; choose one of newton_schulz, svd"),
    ],
)
def test_bad_input_is_refused(arguments: tuple[Tensor, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(*arguments)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no option 'step'; it takes dtype, steps, coefficients"):
        orthogonalize(torch.zeros(3, 3), step=5)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'bf16'; choose one of float64, float32, bfloat16, float16"):
        orthogonalize(torch.zeros(3, 3), dtype="bf16")
