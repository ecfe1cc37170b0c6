"""Rational functions of a matrix, by their partial fractions: what QDWH and ZOLO-PD iterate."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor


class RationalStep(NamedTuple):
    """The map x ↦ scale·(x + Σⱼ residueⱼ · x / (x² + shiftⱼ)) on singular values."""

    scale: float
    shifts: tuple[float, ...]
    residues: tuple[float, ...]
    # QR factorizations keep the digits of small singular values where a shift is small, Cholesky ones are cheaper.
    by_qr: bool


def smallest_singular_value(lower_bound: float | None, matrix: Tensor) -> float:
    """Return ``lower_bound``, or by default the level at which nothing but rounding is left in ``matrix``.

    The largest singular value of a matrix with m rows and Frobenius norm one may be as small as 1/√m.

    Raises:
        ValueError: If ``lower_bound`` is not between 10⁻³⁰ and 1.
    """
    if lower_bound is None:
        return float(torch.finfo(matrix.dtype).eps) / sqrt(matrix.shape[-2])
    if not 1e-30 < lower_bound < 1:
        raise ValueError(f"lower_bound must lie between 1e-30 and 1, got {lower_bound}")
    return lower_bound


def iterate(matrix: Tensor, steps: Sequence[RationalStep]) -> Tensor:
    """Apply rational steps to the singular values of each matrix.

    A wide matrix A = (QR)ᵀ is first brought to its triangular factor, since the polar factor of A is that of R times
    Q: all steps then work on m×m matrices.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, singular values at most one.
        steps: What to apply, in order.

    Returns:
        Shape (batch, m, n).
    """
    m, n = matrix.shape[-2:]
    if n == m:
        return _steps(matrix.mT, steps).mT
    basis, triangle = torch.linalg.qr(matrix.mT)
    factor: Tensor = basis @ _steps(triangle, steps)
    return factor.mT


def _steps(square: Tensor, steps: Sequence[RationalStep]) -> Tensor:
    for step in steps:
        square = _step_by_qr(square, step) if step.by_qr else _step_by_cholesky(square, step)
    return square


def _step_by_qr(square: Tensor, step: RationalStep) -> Tensor:
    """Apply one step with X(XᵀX + sI)⁻¹ = Q₁Q₂ᵀ/√s, where (X; √s·I) = (Q₁; Q₂)R; one batch of QRs for all shifts s.

    The numbers go in one by one: a tensor of them would have to be copied to the device, which the host would wait for.
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


def _step_by_cholesky(square: Tensor, step: RationalStep) -> Tensor:
    """Apply one step with the Cholesky factors of XᵀX + sI, in one batch for all shifts s."""
    shifted = (square.mT @ square).unsqueeze(1).repeat(1, len(step.shifts), 1, 1)
    for j, shift in enumerate(step.shifts):
        shifted[:, j].diagonal(dim1=-2, dim2=-1).add_(shift)
    triangles = torch.linalg.cholesky_ex(shifted).L  # cholesky() would wait for the device, to raise an error
    solutions = torch.cholesky_solve(square.mT.unsqueeze(1).expand_as(shifted), triangles).mT
    result = step.scale * square
    for j, residue in enumerate(step.residues):
        result.add_(solutions[:, j], alpha=step.scale * residue)
    return result
