"""How the odd quintics of every kind of Newton–Schulz are applied to a matrix: one by one, or several at a time."""

import torch
from torch import Tensor

from lightning_muon.optim.optimal_composition import Quintic

# Where the classic quintic, squared, grows no further than for the positive eigenvalues. It gives the restart after two
# steps of Polar Express in float16 that Zhang et al. found by search, and one after three steps of the classic quintic.
LARGEST_NEGATIVE_EIGENVALUE = 0.2


def apply_quintics(matrix: Tensor, schedule: tuple[Quintic, ...], longest_run: int) -> Tensor:
    """Apply quintics to the singular values of each matrix, up to ``longest_run`` at a time where that is cheaper.

    One step replaces X by aX + b(XXᵀ)X + c(XXᵀ)²X, 4m²n + 2m³ FLOPs for an m×n matrix, m ≤ n. A run of k steps takes
    them on the Gram matrix R = XXᵀ alone: each with Z = aI + bR + cR² replaces R by ZRZ, and the product of all Z is
    applied to X at the end, 4m²n + (8k − 6)m³ FLOPs.

    Where X has small singular values, rounding makes some eigenvalues of R negative, which each step of a run
    multiplies by a², as it does the small positive ones, until they blow up. So a run ends before an eigenvalue of
    minus the machine epsilon could grow to −0.2; the next one starts from a fresh R, which is positive again.

    Source of the runs: Zhang, Amsel, Chen & Dao, "Gram Newton-Schulz" (2026),
    https://tridao.me/blog/2026/gram-newton-schulz/.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, singular values at most one.
        schedule: The quintic of each step.
        longest_run: Most steps in a run.

    Returns:
        Shape (batch, m, n), in the dtype of ``matrix``.
    """
    m, n = matrix.shape[-2:]
    for run in cheapest_runs(schedule, longest_run, m, n, torch.finfo(matrix.dtype).eps):
        gram = torch.bmm(matrix, matrix.mT)
        if len(run) == 1:
            a, b, c = run[0]
            # A polynomial of degree three needs no square of the Gram matrix. To add aI would cost it digits.
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
            matrix = torch.baddbmm(matrix, polynomial, matrix, beta=a)
        else:
            matrix = torch.bmm(gram_polynomial(gram, run), matrix)
    return matrix


def cheapest_runs(
    schedule: tuple[Quintic, ...], longest_run: int, m: int, n: int, epsilon: float
) -> list[tuple[Quintic, ...]]:
    """Cut the steps into the runs that take the fewest FLOPs for m×n matrices, none longer than ``longest_run``."""
    cuts = [_runs(schedule, longest, epsilon) for longest in range(1, longest_run + 1)]
    return min(cuts, key=lambda runs: sum(2 * n + (4 * len(run) - 3) * m for run in runs))


def gram_polynomial(gram: Tensor, run: tuple[Quintic, ...]) -> Tensor:
    """Multiply up the polynomials of ``run`` for a Gram matrix of shape (batch, m, m)."""
    factor = product = _polynomial(gram, run[0])
    for quintic in run[1:]:
        gram = torch.bmm(torch.bmm(factor, gram), factor)
        factor = _polynomial(gram, quintic)
        product = torch.bmm(factor, product)
    return product


def _polynomial(gram: Tensor, quintic: Quintic) -> Tensor:
    a, b, c = quintic
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return polynomial


def _runs(schedule: tuple[Quintic, ...], longest: int, epsilon: float) -> list[tuple[Quintic, ...]]:
    """Cut the steps into runs of at most ``longest``, shorter where a run would amplify rounding too much.

    For small eigenvalues of R, negative ones too, a step multiplies by a². The last step of a run computes no R.
    """
    runs: list[tuple[Quintic, ...]] = []
    rounding = epsilon
    for quintic in schedule:
        if runs and len(runs[-1]) < longest and rounding < LARGEST_NEGATIVE_EIGENVALUE:
            runs[-1] += (quintic,)
        else:
            runs.append((quintic,))
            rounding = epsilon
        rounding *= quintic[0] ** 2
    return runs
