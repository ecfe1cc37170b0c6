"""QDWH: the dynamically weighted Halley iteration."""

from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

from lightning_muon.optim.rational_iteration import RationalStep, iterate, smallest_singular_value

# Weights c above this make I + cXᵀX too ill-conditioned for a Cholesky factorization: the bound that the paper gives.
LARGEST_CHOLESKY_WEIGHT = 100.0


def qdwh(matrix: Tensor, lower_bound: float | None = None) -> Tensor:
    """Compute the polar factor of each matrix by the QR-based dynamically weighted Halley iteration.

    A step replaces X by X(aI + bXᵀX)(I + cXᵀX)⁻¹, with the a, b, c that raise the smallest possible singular value
    the most. That is done by a QR factorization of (√c·X; I) while c > 100, and by Cholesky factorizations when the
    weights have gone down towards Halley's own (3, 1, 3).

    The weights follow from ``lower_bound`` alone, so every matrix takes the same few steps, none of which waits for the
    device: four in float32 (two by QR), six in float64 (two or three by QR).

    - Cost: for an m×n matrix, m ≤ n: about 9m³ FLOPs a QR step, 4m³ a Cholesky step, and 6m²n at the start and the end
      where m < n.
    - Error: orthogonal, and with a small backward error, to working precision, for singular values above
      ``lower_bound``; smaller ones, which rounding has left without meaning, come out between zero and one. In
      particular zero gives zero, and a rank-deficient matrix what rounding has made of it.
    - When: the update must be orthogonal whatever the spectrum, or its nuclear norm exact, as in PolarGrad.
    - Source: Nakatsukasa, Bai & Gygi, "Optimizing Halley's iteration for computing the matrix polar decomposition",
      SIAM J. Matrix Anal. Appl. 31 (2010), https://doi.org/10.1137/090774999.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, float32 or float64, singular values at most one.
        lower_bound: The smallest singular value, relative to the Frobenius norm, that should become one. Default: the
            machine epsilon over √m, at which nothing but rounding is left.

    Returns:
        Shape (batch, m, n).
    """
    lower = smallest_singular_value(lower_bound, matrix)
    return iterate(matrix, halley_steps(lower, torch.finfo(matrix.dtype).eps))


@lru_cache(maxsize=128)
def halley_steps(lower: float, epsilon: float) -> tuple[RationalStep, ...]:
    """Compute the weights of each step, until the interval [lower, 1] has become [1 − epsilon, 1]."""
    steps = []
    while 1 - lower > epsilon:
        a, b, c = halley_weights(lower)
        # (a + bx²) / (1 + cx²) = b/c · (1 + residue / (x² + 1/c))
        steps.append(RationalStep(b / c, (1 / c,), (a / b - 1 / c,), by_qr=c > LARGEST_CHOLESKY_WEIGHT))
        lower = min(1.0, lower * (a + b * lower**2) / (1 + c * lower**2))
    return tuple(steps)


def halley_weights(lower: float) -> tuple[float, float, float]:
    """Compute the a, b, c for which x(a + bx²)/(1 + cx²) maps [lower, 1] to the narrowest [·, 1]."""
    d = (4 * (1 - lower**2) / lower**4) ** (1 / 3)
    a = sqrt(1 + d) + sqrt(8 - 4 * d + 8 * (2 - lower**2) / (lower**2 * sqrt(1 + d))) / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1
