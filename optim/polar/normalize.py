"""Frobenius norm one for each matrix of a batch, over the whole range of every dtype."""

import torch
from torch import Tensor

# Between these norms the squares of all entries that matter are inside the range of the dtype: 1e-38 to 3e38 in
# float32, 2e-308 to 2e308 in float64.
SAFE_NORMS = {torch.float32: (1e-12, 1e18), torch.float64: (1e-140, 1e150)}
# The bits of the exponent: what is left of a number without sign and mantissa is the power of two below it.
_EXPONENT_BITS = {torch.float32: (torch.int32, 0xFF << 23), torch.float64: (torch.int64, 0x7FF << 52)}


def normalize(
    batch: Tensor,
    dtype: torch.dtype,
    *,
    in_place: bool = False,
    shape: tuple[int, ...] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Scale each matrix to Frobenius norm one, so that no singular value exceeds one.

    The norm has no floor that would distort small gradients: every matrix with an entry other than zero comes out with
    norm one, to the precision of ``dtype``; a zero matrix stays zero. A matrix with NaN or infinity becomes NaN in
    every entry, and the others are not affected.

    A CPU first takes the norm in the precision of the input and checks its range, matrix by matrix. Other devices must
    not wait for such a check: there the norm of float32 and of half precision is taken in float64, where no square
    overflows or underflows, and float64 is first divided by the power of two below its largest entry.

    Args:
        batch: Shape (b, m, n), in float64, float32, bfloat16 or float16.
        dtype: The dtype of the result. The division is made in at least float32.
        in_place: Whether ``batch`` may be overwritten.
        shape: Raise an error for matrices that are not finite, named as those of a batch of this shape (…, m, n). The
            check waits for the device. ``batch`` is then unchanged.
        mask: Boolean, shape (b,). Where it is false, the result is zero, or NaN where the matrix is not finite.

    Raises:
        ValueError: If ``shape`` is given and a matrix has NaN or infinite entries.
    """
    if batch.is_cpu and not torch.compiler.is_compiling():
        return _normalize_by_checked_norms(batch, in_place, shape, mask).to(dtype)
    if batch.dtype == torch.float64 or batch.is_mps:  # MPS has no float64
        return _normalize_by_powers_of_two(batch, in_place, shape, mask).to(dtype)
    return _normalize_by_float64_norms(batch, dtype, in_place, shape, mask)


def _normalize_by_checked_norms(
    batch: Tensor, in_place: bool, shape: tuple[int, ...] | None, mask: Tensor | None = None
) -> Tensor:
    """Divide by the norms; only matrices with a norm outside of the safe range are first divided by a power of two."""
    wide = batch.to(torch.promote_types(batch.dtype, torch.float32))
    in_place = in_place or wide is not batch
    norms = _norms(wide)
    low, high = SAFE_NORMS[wide.dtype]
    outside = ~((norms > low) & (norms < high)).flatten()  # or NaN
    if outside.any():
        scaled = wide[outside]
        powers = _powers_of_two(scaled)
        norms[outside] = powers
        _check_finite(norms, shape)
        wide = wide if in_place else wide.clone()
        wide[outside] = scaled.div_(powers)
        norms[outside] = _or_one(_norms(scaled))
        in_place = True
    divisors = _masked(norms, mask)
    return wide.div_(divisors) if in_place else wide / divisors


def _normalize_by_float64_norms(
    batch: Tensor, dtype: torch.dtype, in_place: bool, shape: tuple[int, ...] | None, mask: Tensor | None = None
) -> Tensor:
    """Divide by norms in float64, in which the squares of the other dtypes neither overflow nor underflow."""
    is_traced = torch.compiler.is_compiling() or (batch.requires_grad and torch.is_grad_enabled())
    norms: Tensor
    if is_traced:
        norms = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    else:  # the function above would first copy the batch to float64; this one casts in registers
        norms = torch.stack(torch._foreach_norm(batch.unbind(), 2, torch.float64)).view(-1, 1, 1)
    norms = norms.masked_fill(norms.isinf(), torch.nan)
    _check_finite(norms, shape)
    factors = 1 / _masked(norms.clamp_min(torch.finfo(torch.float64).tiny), mask)
    if is_traced:
        return (batch * factors).to(dtype)
    # The kernel casts in registers: it reads the input and writes the result, and nothing of float64 goes to memory.
    result = batch if in_place and batch.dtype == dtype else torch.empty_like(batch, dtype=dtype)
    return torch.mul(batch, factors, out=result)


def _normalize_by_powers_of_two(
    batch: Tensor, in_place: bool, shape: tuple[int, ...] | None, mask: Tensor | None = None
) -> Tensor:
    """Divide first by the power of two below the largest entry, then by the norm."""
    wide = batch.to(torch.promote_types(batch.dtype, torch.float32))
    powers = _powers_of_two(wide)
    _check_finite(powers, shape)
    scaled = wide.div_(powers) if in_place or wide is not batch else wide / powers
    return scaled / _masked(_or_one(_norms(scaled)), mask)


def _masked(norms: Tensor, mask: Tensor | None) -> Tensor:
    """Return positive norms (b, 1, 1), with infinity where ``mask`` is false, so that dividing by them gives zero."""
    return norms if mask is None else norms / mask.view(-1, 1, 1)


def _norms(wide: Tensor) -> Tensor:
    """Return the Frobenius norm (b, 1, 1) of each matrix (b, m, n), in its dtype.

    In float32 it is the norm of the norms of rows, or of columns where these are contiguous: one long sum would lose
    three digits for a matrix of 4096², and two sums of 4096 lose none. A matrix has the same norm alone and in a batch.
    """
    norms: Tensor
    if wide.dtype == torch.float64:
        norms = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    else:
        along, across = (-2, -1) if wide.stride(-2) == 1 else (-1, -2)
        sums = torch.linalg.vector_norm(wide, dim=along, keepdim=True)
        norms = torch.linalg.vector_norm(sums, dim=across, keepdim=True)
    return norms


def _powers_of_two(wide: Tensor) -> Tensor:
    """Return the power of two (b, 1, 1) at or below the largest entry of each matrix, NaN if it is not finite.

    It is at least the smallest normal number. Divisions by it are exact, except for entries so much smaller than the
    largest that they do not matter. The largest entry becomes one to two, or less where it is denormal.
    """
    largest: Tensor = torch.linalg.vector_norm(wide, ord=torch.inf, dim=(-2, -1), keepdim=True)
    integer, exponent = _EXPONENT_BITS[wide.dtype]
    powers = (largest.view(integer) & exponent).view(wide.dtype).clamp_min(torch.finfo(wide.dtype).tiny)
    return powers.masked_fill(~largest.isfinite(), torch.nan)


def _or_one(norms: Tensor) -> Tensor:
    """Return the norms, with one for those of zero matrices, so that they can divide."""
    return norms.masked_fill(norms == 0, 1)


def _check_finite(norms: Tensor, shape: tuple[int, ...] | None) -> None:
    """Raise a ValueError that names the matrices whose norm (b, 1, 1) is NaN; nothing without ``shape``."""
    if shape is None:
        return
    broken = norms.flatten().isnan()
    if broken.any():
        indices = [tuple(index) for index in broken.reshape(shape[:-2]).nonzero().tolist()]
        which = "the matrix" if len(shape) == 2 else f"matrices {', '.join(map(str, indices))} of the batch"
        raise ValueError(f"orthogonalize: NaN or infinite entries in {which} of shape {shape}")
