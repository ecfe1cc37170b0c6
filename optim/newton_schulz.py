"""The Newton–Schulz iteration: a polar factor from matrix products alone."""

import torch
from torch import Tensor

# Maximizes the slope at zero; Keller Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon/, and the default
# of torch.optim.Muon. The iteration does not converge: it leaves the singular values between about 0.68 and 1.13.
KELLER_JORDAN_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
KELLER_JORDAN_STEPS = 5


def newton_schulz(
    matrix: Tensor,
    steps: int = KELLER_JORDAN_STEPS,
    coefficients: tuple[float, float, float] = KELLER_JORDAN_COEFFICIENTS,
) -> Tensor:
    """Drive the singular values of each matrix towards one by an odd quintic polynomial.

    Each step replaces X by aX + b(XXᵀ)X + c(XXᵀ)²X, which maps every singular value σ to aσ + bσ³ + cσ⁵ and leaves the
    singular vectors alone. It costs 2m²(2n + m) FLOPs a step for an m×n matrix.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, singular values at most one.
        steps: Number of iterations.
        coefficients: The a, b and c of the polynomial.

    Returns:
        Shape (batch, m, n), in the dtype of ``matrix``.
    """
    a, b, c = coefficients
    for _ in range(steps):
        gram = matrix @ matrix.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        matrix = torch.baddbmm(matrix, polynomial, matrix, beta=a)
    return matrix
