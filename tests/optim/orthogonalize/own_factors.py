"""Functions that a user might write in place of a method."""

import torch
from torch import Tensor


def by_svd(matrix: Tensor, power: float = 0.0) -> Tensor:
    """U Sᵖ Vᵀ, with S the singular values."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = u * s.pow(power).unsqueeze(-2) @ vh
    return factor


def cubic(matrix: Tensor, *, steps: int) -> Tensor:
    """Newton–Schulz, written down; ``steps`` must be given."""
    for _ in range(steps):
        matrix = 1.5 * matrix - 0.5 * matrix @ matrix.mT @ matrix
    return matrix


def transposed(matrix: Tensor) -> Tensor:
    """A mistake."""
    return matrix.mT


def takes_any(matrix: Tensor, **options: float) -> Tensor:
    """The matrix times the product of the options."""
    for factor in options.values():
        matrix = matrix * factor
    return matrix


not_a_function = 3
