"""Matrices with a known spectrum, and errors of their polar factors, in float64."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import orthogonalize


@pytest.fixture(autouse=True)
def single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 where no test says otherwise, also on a CPU that would take bfloat16."""
    monkeypatch.setattr(sys.modules[orthogonalize.__module__], "_cpu_multiplies_bfloat16", lambda: False)


class PolarError(NamedTuple):
    """How far a computed factor O of A is from the polar factor."""

    orthogonality: float  # ‖OᵀO − I‖_F / √r
    backward: float  # ‖A − OH‖ / ‖A‖ with H the symmetric part of OᵀA
    forward: float  # ‖O − UVᵀ‖₂


@pytest.fixture
def with_spectrum() -> Callable[[Tensor, int, int], Tensor]:
    """Make a random matrix of float64 from its singular values and its shape."""

    def make(singular_values: Tensor, rows: int, columns: int) -> Tensor:
        rank = len(singular_values)
        u = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64)).Q
        v = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64)).Q
        matrix: Tensor = u * singular_values @ v.mT
        return matrix

    return make


@pytest.fixture
def polar_factor() -> Callable[[Tensor], Tensor]:
    """Compute U Vᵀ in float64."""

    def compute(matrix: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        factor: Tensor = u @ vh
        return factor

    return compute


@pytest.fixture
def polar_error(polar_factor: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], PolarError]:
    """Measure a factor of a matrix."""

    def measure(matrix: Tensor, factor: Tensor) -> PolarError:
        if matrix.shape[0] < matrix.shape[1]:
            matrix, factor = matrix.mT, factor.mT
        a, o = matrix.double(), factor.double()
        rank = a.shape[1]
        product = o.mT @ a
        return PolarError(
            orthogonality=float(torch.linalg.matrix_norm(o.mT @ o - torch.eye(rank)) / rank**0.5),
            backward=float(torch.linalg.matrix_norm(a - o @ (product + product.mT) / 2) / torch.linalg.matrix_norm(a)),
            forward=float(torch.linalg.matrix_norm(o - polar_factor(a), 2)),
        )

    return measure
