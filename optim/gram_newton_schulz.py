"""Gram Newton–Schulz: the iteration on the small square matrix XXᵀ."""

import torch
from torch import Tensor

from lightning_muon.optim.newton_schulz import (
    KELLER_JORDAN_COEFFICIENTS,
    KELLER_JORDAN_STEPS,
    Coefficients,
    newton_schulz,
    quintics,
)
from lightning_muon.optim.optimal_composition import Quintic

# Where the classic quintic, squared, grows no further than for the positive eigenvalues. It gives the restart after two
# steps of Polar Express in float16 that the authors found by search, and one after three steps of the classic quintic.
LARGEST_NEGATIVE_EIGENVALUE = 0.2


def gram_newton_schulz(
    matrix: Tensor,
    steps: int = KELLER_JORDAN_STEPS,
    coefficients: Coefficients = KELLER_JORDAN_COEFFICIENTS,
    restart_every: int = 3,
) -> Tensor:
    """Compute what ``newton_schulz`` computes, from fewer products with the long side.

    The polynomials of all steps act on the Gram matrix R = XXᵀ alone: a step with Z = aI + bR + cR² replaces R by
    ZRZ, and the product Q of all Z is applied to X once, at the end. Where X has small singular values, rounding makes
    some eigenvalues of R negative; each step multiplies those by a² as it does the small positive ones, and in the
    end they blow up. So every few steps the iteration restarts: X becomes QX, which makes R positive again. How soon
    that must be follows from the precision and the coefficients: before an eigenvalue of minus the machine epsilon
    could grow to −0.2, whatever ``restart_every`` says.

    - Cost: 4m²n FLOPs a start for an m×n matrix, m ≤ n, and about 8m³ a step, instead of 4m²n + 2m³ a step. Where that
      is no less (with the defaults, for n < 1.5 m), it is ``newton_schulz`` that runs.
    - Error: that of ``newton_schulz``; within 10⁻⁴ of it in float32, 10⁻² in float16. bfloat16 is refused: it would
      have to restart nearly every step.
    - When: long matrices, four to one and more.
    - Source: Zhang, Amsel, Chen & Dao, "Gram Newton-Schulz" (2026), https://tridao.me/blog/2026/gram-newton-schulz/.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, singular values at most one.
        steps: Number of iterations.
        coefficients: As for :func:`~lightning_muon.optim.newton_schulz.newton_schulz`.
        restart_every: Largest number of steps between restarts.

    Returns:
        Shape (batch, m, n), in the dtype of ``matrix``.
    """
    schedule = quintics(coefficients, steps)
    runs = runs_between_restarts(schedule, restart_every, torch.finfo(matrix.dtype).eps)
    m, n = matrix.shape[-2:]
    long_products, square_products = 2 * len(runs), sum(4 * len(run) - 3 for run in runs)
    if long_products * n + square_products * m >= steps * (2 * n + m):
        return newton_schulz(matrix, steps, schedule)
    for run in runs:
        matrix = gram_polynomial(matrix @ matrix.mT, run) @ matrix
    return matrix


def runs_between_restarts(
    schedule: tuple[Quintic, ...], restart_every: int, epsilon: float
) -> list[tuple[Quintic, ...]]:
    """Cut the steps into runs of at most ``restart_every``, shorter where a run would amplify rounding too much.

    For small eigenvalues of R, negative ones too, a step multiplies by a². The last step of a run computes no R.

    Raises:
        ValueError: If ``restart_every`` is less than one.
    """
    if restart_every < 1:
        raise ValueError(f"restart_every must be at least 1, got {restart_every}")
    runs: list[tuple[Quintic, ...]] = []
    rounding = epsilon
    for quintic in schedule:
        if runs and len(runs[-1]) < restart_every and rounding < LARGEST_NEGATIVE_EIGENVALUE:
            runs[-1] += (quintic,)
        else:
            runs.append((quintic,))
            rounding = epsilon
        rounding *= quintic[0] ** 2
    return runs


def gram_polynomial(gram: Tensor, run: tuple[Quintic, ...]) -> Tensor:
    """Multiply up the polynomials of ``run`` for a Gram matrix of shape (batch, m, m)."""
    factors: list[tuple[float, Tensor]] = []
    for step, (a, b, c) in enumerate(run):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # Z without aI, which would cost it digits
        factors.append((a, polynomial))
        if step < len(run) - 1:
            half = torch.baddbmm(gram, gram, polynomial, beta=a)
            gram = torch.baddbmm(half, polynomial, half, beta=a)
    a, product = factors[0]
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for a, polynomial in factors[1:]:
        product = torch.baddbmm(product, product, polynomial, beta=a)
    return product
