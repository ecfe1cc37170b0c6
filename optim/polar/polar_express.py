"""Polar Express: Newton–Schulz with the best polynomial at each step."""

import torch
from torch import Tensor

from lightning_muon.optim.polar.newton_schulz import apply_quintics, cheapest_runs, gram_polynomial
from lightning_muon.optim.polar.quintics import Quintic, optimal_composition


def polar_express(matrix: Tensor, steps: int = 5, lower_bound: float = 1e-3, restart_every: int = 2) -> Tensor:
    """Drive the singular values of each matrix to one by the best composition of odd quintics.

    Each step replaces X by aX + b(XXᵀ)X + c(XXᵀ)²X, with the a, b, c that minimize the largest possible distance of a
    singular value from one, given that it started between ``lower_bound`` and one.

    The paper first divides X by its Frobenius norm, which may be √m times the largest singular value. Here X is divided
    by the eighth root of tr (XXᵀ)⁴, which is at most the eighth root of m too large. The first step computes (XXᵀ)²
    anyway, so this costs almost nothing; for a Gaussian square matrix it saves a step.

    - Cost: 2m²(2n + m) FLOPs a step for an m×n matrix, m ≤ n, or 2m²(2n + 5m) two steps at a time, as for
      ``newton_schulz``.
    - Error: for singular values of at least 10⁻³ times that norm 0.15 after five steps, 4·10⁻³ after six, 4·10⁻⁷ after
      seven. Unlike with the classic coefficients more steps help, until rounding is reached.
    - When: in place of ``newton_schulz``, unless its exact recipe must be reproduced. Four steps with a ``lower_bound``
      of 0.01 give factors closer to orthogonal than five of the classic quintic, for Gaussian matrices and for those of
      condition 10³.
    - Source: Amsel, Persson, Musco & Gower, "The Polar Express" (2025), https://arxiv.org/abs/2505.16932.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, Frobenius norm at most one.
        steps: Number of iterations.
        lower_bound: The smallest singular value, relative to the norm above, that should arrive near one. With a higher
            bound the larger ones arrive sooner.
        restart_every: Largest number of steps that are taken on XXᵀ at a time, see
            :func:`~lightning_muon.optim.polar.newton_schulz.apply_quintics`. Three are faster in float32 and float16
            for matrices four times as long as wide.

    Returns:
        Shape (batch, m, n), in the dtype of ``matrix``.

    Raises:
        ValueError: If ``lower_bound`` is not between 0 and 1, or ``steps`` or ``restart_every`` is less than one.
    """
    for name, number in (("steps", steps), ("restart_every", restart_every)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    quintics = optimal_composition(steps, lower_bound)
    m, n = matrix.shape[-2:]
    run = cheapest_runs(quintics, restart_every, m, n, torch.finfo(matrix.dtype).eps)[0]
    matrix = _normalize_and_run(matrix, run)
    return apply_quintics(matrix, quintics[len(run) :], restart_every)


def _normalize_and_run(matrix: Tensor, run: tuple[Quintic, ...]) -> Tensor:
    """Divide each matrix by an upper bound of its largest singular value, and apply quintics to it.

    The coefficients of the first quintic are applied to m×m matrices in at least float32, since rounding to bfloat16
    would change them.
    """
    a, b, c = run[0]
    wide = torch.promote_types(matrix.dtype, torch.float32)
    gram = torch.bmm(matrix, matrix.mT)
    size = _norm(gram, wide)
    gram = (gram / size).to(matrix.dtype)  # else its square would underflow in float16
    square = torch.bmm(gram, gram)
    largest = _norm(square, wide).sqrt()  # at least the largest eigenvalue of gram
    polynomial: Tensor = (b / largest) * gram + (c / largest**2) * square
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    if len(run) > 1:
        narrow = polynomial.to(matrix.dtype)
        next_gram = torch.bmm(torch.bmm(narrow, (gram / largest).to(matrix.dtype)), narrow)
        polynomial = torch.bmm(gram_polynomial(next_gram, run[1:]), narrow)
    polynomial = (polynomial / (size * largest).sqrt()).to(matrix.dtype)
    return torch.bmm(polynomial, matrix)


def _norm(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the Frobenius norm of each matrix, or one where it is zero, so that it can divide."""
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=dtype)
    positive: Tensor = norm.where(norm != 0, 1)
    return positive
