"""Newton–Schulz iterations: polar factors from matrix products alone, step by step or in runs on the Gram matrix."""

import torch
from torch import Tensor

from lightning_muon.optim.polar.options import check_lower_bound, check_whole
from lightning_muon.optim.polar.quintics import (
    KELLER_JORDAN_COEFFICIENTS,
    KELLER_JORDAN_STEPS,
    Coefficients,
    Quintic,
    optimal_composition,
    quintics,
)

# The most negative eigenvalue, in magnitude, that a run may reach: there the classic quintic, squared, grows no further
# than for the positive eigenvalues. It gives the restart after two steps of Polar Express in float16 that Zhang et al.
# found by search, and one after three steps of the classic quintic.
LARGEST_NEGATIVE_EIGENVALUE = 0.2


def newton_schulz(
    matrix: Tensor, steps: int = KELLER_JORDAN_STEPS, coefficients: Coefficients = KELLER_JORDAN_COEFFICIENTS
) -> Tensor:
    """Drive the singular values of each matrix towards one by odd polynomials of degree five, or three.

    Each step replaces X by aX + b(XXᵀ)X + c(XXᵀ)²X, which maps every singular value σ to aσ + bσ³ + cσ⁵ and leaves the
    singular vectors alone. Where n ≥ 1.5m, two steps are taken at a time on XXᵀ with the same rounding error, see
    :func:`apply_quintics`.

    - Cost: 2m²(2n + m) FLOPs a step for an m×n matrix, m ≤ n, and 2m²(2n + 5m) for two steps at a time; 4m²n a step
      with the cubic.
    - Error: the default brings the singular values that started above about 0.01 to between 0.68 and 1.13, and leaves
      smaller ones below that. The cubic converges to working precision, but takes log(σ₁/σₘ) / log 1.5 steps and a few.
    - When: the default is the classic Muon. For a smaller error at the same cost take ``polar_express``.
    - Source: Keller Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon/.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, singular values at most one. The result has its shape and dtype.
        steps: Number of iterations.
        coefficients: The a, b and c of the polynomial; or a list of such triples, one a step, the last of which is
            repeated; or the name of a published set, of which the first ``steps`` triples are taken:

            - ``"keller_jordan"``: the default.
            - ``"cubic"``: the convergent iteration, (3/2, −1/2, 0).
            - ``"polar_express"``: for any number of steps, see :func:`polar_express`.
            - ``"modded_nanogpt"``: five steps of the NanoGPT speedrun, "quintic" in Emerging-Optimizers. As fast as the
              default, and three times closer to one above 0.005, but up to 1.15 where they started at 0.002.
            - ``"modula"``: six steps by YouJiacheng; nothing exceeds one.
            - ``"deepseek_v4"``: ten steps, within 10⁻³ of one.

            Their sources and bands are in :mod:`~lightning_muon.optim.polar.quintics`.

    Raises:
        ValueError: If ``steps`` or ``coefficients`` is not of this kind.
    """
    return apply_quintics(matrix, quintics(coefficients, steps), longest_run=2)


def gram_newton_schulz(
    matrix: Tensor,
    steps: int = KELLER_JORDAN_STEPS,
    coefficients: Coefficients = KELLER_JORDAN_COEFFICIENTS,
    restart_every: int = 3,
) -> Tensor:
    """Compute what ``newton_schulz`` computes, from fewer products with the long side.

    The polynomials of up to ``restart_every`` steps act on the Gram matrix XXᵀ alone, and their product is applied to X
    once. Runs are shorter where rounding does not allow so many steps (two in bfloat16), or where m×m products cost
    more than they save; see :func:`apply_quintics`.

    - Cost: 4m²n FLOPs a run for an m×n matrix, m ≤ n, and about 8m³ a step, instead of 4m²n + 2m³ a step.
    - Error: that of ``newton_schulz``; within 10⁻⁴ of it in float32, 10⁻² in float16.
    - When: long matrices, four to one and more, in float32 or float16. In bfloat16 it is ``newton_schulz``.
    - Source: Zhang, Amsel, Chen & Dao, "Gram Newton-Schulz" (2026), https://tridao.me/blog/2026/gram-newton-schulz/.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, singular values at most one. The result has its shape and dtype.
        steps: Number of iterations.
        coefficients: As for :func:`newton_schulz`.
        restart_every: Largest number of steps in a run.

    Raises:
        ValueError: If ``restart_every`` is not a whole number of at least one, or as for :func:`newton_schulz`.
    """
    check_whole("restart_every", restart_every)
    return apply_quintics(matrix, quintics(coefficients, steps), restart_every)


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
        matrix: Shape (batch, m, n), m ≤ n, Frobenius norm at most one. The result has its shape and dtype.
        steps: Number of iterations.
        lower_bound: The smallest singular value, relative to the norm above, that should arrive near one. With a higher
            bound the larger ones arrive sooner.
        restart_every: Largest number of steps that are taken on XXᵀ at a time, see :func:`apply_quintics`. Three are
            faster in float32 and float16 for matrices four times as long as wide.

    Raises:
        ValueError: If ``lower_bound`` is not between 10⁻³⁰ and 1, or ``steps`` or ``restart_every`` is not a whole
            number of at least one.
    """
    check_whole("steps", steps)
    check_lower_bound(lower_bound)
    check_whole("restart_every", restart_every)
    schedule = optimal_composition(steps, lower_bound)
    m, n = matrix.shape[-2:]
    run = cheapest_runs(schedule, restart_every, m, n, torch.finfo(matrix.dtype).eps)[0]
    matrix = _normalize_and_run(matrix, run)
    return apply_quintics(matrix, schedule[len(run) :], restart_every)


def apply_quintics(matrix: Tensor, schedule: tuple[Quintic, ...], longest_run: int) -> Tensor:
    """Apply quintics to the singular values of each matrix, up to ``longest_run`` at a time where that is cheaper.

    One step replaces X by aX + b(XXᵀ)X + c(XXᵀ)²X, 4m²n + 2m³ FLOPs for an m×n matrix, m ≤ n. A run takes k steps on
    the Gram matrix R = XXᵀ alone: each step, with Z = aI + bR + cR², replaces R by ZRZ, and the product of all Z is
    applied to X at the end, 4m²n + (8k − 6)m³ FLOPs.

    Where X has small singular values, rounding makes some eigenvalues of R negative. Each step of a run multiplies them
    by a², as it does the small positive ones, until they diverge. So a run ends before an eigenvalue of minus the
    machine epsilon could grow to −0.2; the next run starts from a new R, which is positive again.

    The source of the runs is named at :func:`gram_newton_schulz`. The matrices have the shape (batch, m, n), m ≤ n, and
    singular values at most one. The result has their shape and dtype.
    """
    m, n = matrix.shape[-2:]
    for run in cheapest_runs(schedule, longest_run, m, n, torch.finfo(matrix.dtype).eps):
        gram = torch.bmm(matrix, matrix.mT)
        if len(run) == 1:
            # Adding aI to the polynomial would cost digits.
            matrix = torch.baddbmm(matrix, _without_constant(gram, run[0]), matrix, beta=run[0][0])
        else:
            matrix = torch.bmm(gram_polynomial(gram, run), matrix)
    return matrix


def cheapest_runs(
    schedule: tuple[Quintic, ...], longest_run: int, m: int, n: int, epsilon: float
) -> list[tuple[Quintic, ...]]:
    """Cut a schedule into the runs of at most ``longest_run`` steps that take the fewest FLOPs.

    The matrices are m×n, m ≤ n, in a dtype whose machine epsilon is ``epsilon``.
    """
    cuts = [_runs(schedule, longest, epsilon) for longest in range(1, longest_run + 1)]
    return min(cuts, key=lambda runs: sum(2 * n + (4 * len(run) - 3) * m for run in runs))


def gram_polynomial(gram: Tensor, run: tuple[Quintic, ...]) -> Tensor:
    """Multiply the polynomials of ``run`` for Gram matrices of shape (batch, m, m)."""
    factor = product = _polynomial(gram, run[0])
    for quintic in run[1:]:
        gram = torch.bmm(torch.bmm(factor, gram), factor)
        factor = _polynomial(gram, quintic)
        product = torch.bmm(factor, product)
    return product


def _polynomial(gram: Tensor, quintic: Quintic) -> Tensor:
    polynomial = _without_constant(gram, quintic)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(quintic[0])
    return polynomial


def _without_constant(gram: Tensor, quintic: Quintic) -> Tensor:
    """Return bR + cR² in a new tensor.

    A polynomial of degree three needs no square. On CPUs that multiply in bfloat16 ``baddbmm`` with alpha=0 returns R
    instead of bR (torch 2.13).
    """
    _, b, c = quintic
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram


def _runs(schedule: tuple[Quintic, ...], longest: int, epsilon: float) -> list[tuple[Quintic, ...]]:
    """Cut the steps into runs of at most ``longest``, shorter where a run would amplify rounding too much.

    A step multiplies small eigenvalues of R, negative ones too, by a². The last step of a run computes no R.
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
