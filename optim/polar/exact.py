"""Polar factors to working precision: QDWH, ZOLO-PD and the singular value decomposition.

QDWH and ZOLO-PD iterate rational functions of the singular values, computed by their partial fractions.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import pi, prod, sinh, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muon.optim.polar.options import check_lower_bound

# Weights c above this make I + cXᵀX too ill-conditioned for a Cholesky factorization: the bound of the QDWH paper.
LARGEST_CHOLESKY_WEIGHT = 100.0
# In float64 the rounding of XXᵀ, of trace one, is some 10⁻¹⁶. With a shift from this on, XXᵀ + shift·I stays positive.
SMALLEST_FLOAT64_SHIFT = 1e-13
# Triangular matrices up to this size are inverted by the library, larger ones by products of their blocks.
SMALL_TRIANGLE = 64


def qdwh(matrix: Tensor, lower_bound: float | None = None) -> Tensor:
    """Compute the polar factor of each matrix by the QR-based dynamically weighted Halley iteration.

    A step replaces X by X(aI + bXᵀX)(I + cXᵀX)⁻¹, with the a, b, c that raise the smallest possible singular value
    the most. The weights come down towards Halley's own (3, 1, 3). They follow from ``lower_bound`` alone, so every
    matrix takes the same few steps and none waits for the device: four in float32, six in float64.

    While c > 100 the matrix I + cXᵀX is too ill-conditioned for the working precision. The two such steps of float32
    are made in float64, which also keeps the digits of small singular values; those of float64 by a QR factorization of
    (√c·X; I). The other steps use Cholesky factorizations. QR factorizations are slow on GPUs, which the float32 of an
    optimizer thus avoids.

    - Cost: for an m×m matrix about 9m³ FLOPs a QR step and 5m³ another one. For an m×n matrix, m < n, 6m²n more for a
      QR factorization before and after; float32 on a GPU instead 4m²n more in each step.
    - Error: orthogonal, and with a small backward error, to working precision, for singular values above
      ``lower_bound``. Smaller ones, which are only rounding, come out between zero and one. Zero gives zero, and a
      rank-deficient matrix gives what rounding has made of it.
    - When: the update must be orthogonal whatever the spectrum, or its nuclear norm exact, as in PolarGrad.
    - Source: Nakatsukasa, Bai & Gygi, "Optimizing Halley's iteration for computing the matrix polar decomposition",
      SIAM J. Matrix Anal. Appl. 31 (2010), https://doi.org/10.1137/090774999.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, float32 or float64, singular values at most one. The result has its shape.
        lower_bound: The smallest singular value, relative to the Frobenius norm, that should become one. Default: the
            machine epsilon over √m, below which there is only rounding.
    """
    lower = _smallest_singular_value(lower_bound, matrix)
    return _iterate(matrix, halley_steps(lower, torch.finfo(matrix.dtype).eps))


def zolo_pd(matrix: Tensor, lower_bound: float | None = None) -> Tensor:
    """Compute the polar factor of each matrix by two steps of the best rational approximation to the sign.

    Zolotarev's function x·∏ⱼ (x² + c₂ⱼ) / (x² + c₂ⱼ₋₁) of type (2r + 1, 2r) maps [lower_bound, 1] to the narrowest
    interval below one. With r large enough (eight or nine in float64, five or six in float32) two steps reach working
    precision. The r fractions of a step are independent: one batch of r QR factorizations in the first step, of r
    Cholesky factorizations in the second. QDWH is the same iteration with r = 1.

    - Cost: for an m×n matrix, m ≤ n: about 12m³·r FLOPs, and 6m²n at the start and the end where m < n; r times the
      memory. QR factorizations are slow on GPUs, and the smallest shift is too small to avoid them as ``qdwh`` does.
    - Error: as ``qdwh``: orthogonal, and with a small backward error, to working precision above ``lower_bound``;
      smaller singular values come out between zero and one.
    - When: to reproduce it, or on a device that is faster with r times the work in half the steps. Elsewhere ``qdwh``.
    - Source: Nakatsukasa & Freund, "Computing fundamental matrix decompositions accurately via the matrix sign
      function in two iterations: the power of Zolotarev's functions", SIAM Review 58 (2016),
      https://doi.org/10.1137/140990334.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, float32 or float64, singular values at most one. The result has its shape.
        lower_bound: As for :func:`qdwh`.
    """
    lower = _smallest_singular_value(lower_bound, matrix)
    return _iterate(matrix, zolotarev_steps(lower, torch.finfo(matrix.dtype).eps))


def svd(matrix: Tensor) -> Tensor:
    """Compute the polar factor U Vᵀ from the singular value decomposition U S Vᵀ.

    Singular values at the level of rounding (the machine epsilon times max(m, n), relative to the largest) count as
    zero, so a zero matrix, and its zero rows and columns, stay zero. By default it computes in float64 for every input
    dtype, so that this level lies far below the singular values of a float32 matrix.

    - Cost: about 14m²n + 8m³ FLOPs for an m×n matrix, m ≤ n, few of them in matrix products: the slowest by far.
    - Error: orthogonal, and with a small backward error, to working precision.
    - When: as the reference for the others, and for small matrices.
    - Source: Golub & Van Loan, "Matrix Computations" (2013), sections 8.6 and 9.4.3.

    Args:
        matrix: Shape (batch, m, n), float32 or float64. The result has its shape. A matrix that is not finite gives
            NaN, the others their factor.
    """
    finite = matrix.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    # LAPACK would refuse the batch for one matrix that is not finite.
    u, s, vh = torch.linalg.svd(matrix.where(finite, 0), full_matrices=False)
    rounding = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:])
    in_range = (s > rounding * s.amax(dim=-1, keepdim=True)).to(matrix.dtype)
    factor: Tensor = (u * in_range.unsqueeze(-2)) @ vh
    return factor.where(finite, torch.nan)


class RationalStep(NamedTuple):
    """The map x ↦ scale·(x + Σⱼ residueⱼ · x / (x² + shiftⱼ)) on singular values."""

    scale: float
    shifts: tuple[float, ...]
    residues: tuple[float, ...]
    # Whether x² + shift loses the digits of small singular values in the working precision.
    ill_conditioned: bool


@lru_cache(maxsize=128)
def halley_steps(lower: float, epsilon: float) -> tuple[RationalStep, ...]:
    """Compute the steps of QDWH that bring the interval [lower, 1] to [1 − epsilon, 1]."""
    steps = []
    while 1 - lower > epsilon:
        a, b, c = halley_weights(lower)
        # (a + bx²) / (1 + cx²) = b/c · (1 + residue / (x² + 1/c))
        steps.append(RationalStep(b / c, (1 / c,), (a / b - 1 / c,), ill_conditioned=c > LARGEST_CHOLESKY_WEIGHT))
        lower = min(1.0, lower * (a + b * lower**2) / (1 + c * lower**2))
    return tuple(steps)


def halley_weights(lower: float) -> tuple[float, float, float]:
    """Compute the a, b, c for which x(a + bx²)/(1 + cx²) maps [lower, 1] to the narrowest [·, 1]."""
    d = (4 * (1 - lower**2) / lower**4) ** (1 / 3)
    a = sqrt(1 + d) + sqrt(8 - 4 * d + 8 * (2 - lower**2) / (lower**2 * sqrt(1 + d))) / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


@lru_cache(maxsize=128)
def zolotarev_steps(lower: float, epsilon: float) -> tuple[RationalStep, ...]:
    """Compute the two steps of the lowest degree that bring [lower, 1] to [1 − epsilon, 1]."""
    terms = 0
    reached = 0.0
    while 1 - reached > 10 * epsilon:  # reached itself is exact to a few roundings
        terms += 1
        first, image = zolotarev_step(lower, terms, ill_conditioned=True)
        second, reached = zolotarev_step(image, terms, ill_conditioned=False)
    return first, second


def zolotarev_step(lower: float, terms: int, *, ill_conditioned: bool) -> tuple[RationalStep, float]:
    """Compute Zolotarev's function of type (2·terms + 1, 2·terms) for [lower, 1], and its value at ``lower``.

    With k' = lower and K' the quarter period, cᵢ = k'² sc²(iK' / (2·terms + 1)), where sc = sn/cn at the modulus
    √(1 − k'²). Since sc(K' − u) = 1 / (k' sc(u)), the large cᵢ are k'² over the small ones.
    """
    parts = 2 * terms + 1
    quarter = pi / (2 * _arithmetic_geometric_mean(1.0, lower))
    small = [(lower * _sc(i * quarter / parts, lower)) ** 2 for i in range(1, terms + 1)]
    c = small + [lower**2 / value for value in reversed(small)]
    poles, zeros = c[0::2], c[1::2]

    def unscaled(x: float) -> float:
        return x * prod((x * x + zero) / (x * x + pole) for zero, pole in zip(zeros, poles, strict=True))

    scale = 1 / unscaled(1.0)
    residues = tuple(
        -prod(pole - zero for zero in zeros) / prod(pole - other for other in poles if other != pole) for pole in poles
    )
    image = min(scale * unscaled(lower), 1 - 2**-53)  # rounding must not bring it to one
    return RationalStep(scale, tuple(poles), residues, ill_conditioned), image


def _sc(u: float, complement: float) -> float:
    """Compute sn(u)/cn(u) at the modulus √(1 − complement²), for u up to half the quarter period.

    Jacobi's imaginary transformation makes it the sine amplitude of iu at the modulus ``complement``; Landen's
    transformation shrinks that modulus until sn is the sine. Unlike sn and cn apart, this never cancels.
    """
    if complement < 1e-9:
        return sinh(u)
    smaller = (complement / (1 + sqrt(1 - complement**2))) ** 2
    value = _sc(u / (1 + smaller), smaller)
    return (1 + smaller) * value / (1 - smaller * value**2)


def _arithmetic_geometric_mean(a: float, b: float) -> float:
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, sqrt(a * b)
    return a


def _smallest_singular_value(lower_bound: float | None, matrix: Tensor) -> float:
    """Return ``lower_bound``, or by default the level below which ``matrix`` contains only rounding.

    The largest singular value of a matrix with m rows and Frobenius norm one may be as small as 1/√m.

    Raises:
        ValueError: If ``lower_bound`` is not between 10⁻³⁰ and 1.
    """
    if lower_bound is None:
        return float(torch.finfo(matrix.dtype).eps) / sqrt(matrix.shape[-2])
    check_lower_bound(lower_bound)
    return lower_bound


def _iterate(matrix: Tensor, steps: Sequence[RationalStep]) -> Tensor:
    """Apply rational steps to the singular values of each matrix (batch, m, n), m ≤ n.

    A wide matrix A = (QR)ᵀ is first reduced to its triangular factor, since the polar factor of A is that of R times Q.
    All steps then work on m×m matrices. Where QR factorizations are slow, and the steps do without, so does this.
    """
    m, n = matrix.shape[-2:]
    in_float64 = matrix.dtype == torch.float32 and not matrix.is_mps and _float64_suffices(steps)
    if n == m or (in_float64 and not matrix.is_cpu):
        return _apply(steps, matrix, in_float64)
    basis, triangle = torch.linalg.qr(matrix.mT)
    factor: Tensor = basis @ _apply(steps, triangle, in_float64)
    return factor.mT


def _float64_suffices(steps: Sequence[RationalStep]) -> bool:
    return all(shift >= SMALLEST_FLOAT64_SHIFT for step in steps for shift in step.shifts)


def _apply(steps: Sequence[RationalStep], matrix: Tensor, in_float64: bool) -> Tensor:
    """Apply steps, the ill-conditioned ones in float64, or by QR factorizations of square matrices."""
    dtype = matrix.dtype
    for step in steps:
        if step.ill_conditioned and not in_float64:
            matrix = _step_by_qr(matrix, step)
        else:
            matrix = _step_by_cholesky(matrix.to(torch.float64 if step.ill_conditioned else dtype), step)
    return matrix.to(dtype)


def _step_by_qr(square: Tensor, step: RationalStep) -> Tensor:
    """Apply one step with X(XᵀX + sI)⁻¹ = Q₁Q₂ᵀ/√s, where (X; √s·I) = (Q₁; Q₂)R; one batch of QRs for all shifts s.

    The shifts are written one by one: a tensor of them would have to be copied to the device, and the host would wait.
    """
    m = square.shape[-1]
    stacked = square.new_zeros(square.shape[0], len(step.shifts), 2 * m, m)
    stacked[..., :m, :] = square.unsqueeze(1)
    for j, shift in enumerate(step.shifts):
        stacked[:, j, m:].diagonal(dim1=-2, dim2=-1).fill_(sqrt(shift))
    upper, lower = torch.linalg.qr(stacked).Q.split(m, dim=-2)
    result = step.scale * square
    for j, (shift, residue) in enumerate(zip(step.shifts, step.residues, strict=True)):
        result = torch.baddbmm(result, upper[:, j], lower[:, j].mT, alpha=step.scale * residue / sqrt(shift))
    return result


def _step_by_cholesky(matrix: Tensor, step: RationalStep) -> Tensor:
    """Apply one step with (XXᵀ + sI)⁻¹X by the Cholesky factors of XXᵀ + sI, in one batch for all shifts s."""
    shifted = (matrix @ matrix.mT).unsqueeze(1).repeat(1, len(step.shifts), 1, 1)
    for j, shift in enumerate(step.shifts):
        shifted[:, j].diagonal(dim1=-2, dim2=-1).add_(shift)
    triangles = torch.linalg.cholesky_ex(shifted).L  # cholesky() would wait for the device, to raise an error
    if triangles.is_cpu:
        inverses = torch.cholesky_inverse(triangles)
    else:  # where its substitutions would take longer than products do
        halves = _inverse_of_triangle(triangles)
        inverses = halves.mT @ halves
    combined = inverses[:, 0] * (step.scale * step.residues[0])
    for j, residue in enumerate(step.residues[1:], 1):
        combined.add_(inverses[:, j], alpha=step.scale * residue)
    return torch.baddbmm(matrix, combined, matrix, beta=step.scale)


def _inverse_of_triangle(triangle: Tensor) -> Tensor:
    """Invert lower triangular matrices (…, m, m) by products of blocks, those on the diagonal in one batch.

    The inverse of ((A, 0); (B, C)) is ((A⁻¹, 0); (−C⁻¹BA⁻¹, C⁻¹)).
    """
    m = triangle.shape[-1]
    if m <= SMALL_TRIANGLE:
        identity = torch.eye(m, dtype=triangle.dtype, device=triangle.device)
        small: Tensor = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=False)
        return small
    half = -(-m // 2)
    padded = torch.nn.functional.pad(triangle, (0, 2 * half - m, 0, 2 * half - m))
    padded[..., m:, m:] = 1  # one row at most: the blocks have one size
    blocks = torch.stack([padded[..., :half, :half], padded[..., half:, half:]])
    first, last = _inverse_of_triangle(blocks)
    inverse = torch.zeros_like(padded)
    inverse[..., :half, :half] = first
    inverse[..., half:, half:] = last
    inverse[..., half:, :half] = -(last @ padded[..., half:, :half] @ first)
    return inverse[..., :m, :m]
