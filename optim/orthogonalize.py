"""One door to every way of computing the polar factor of a matrix."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_muon.optim.gram_newton_schulz import gram_newton_schulz
from lightning_muon.optim.newton_schulz import newton_schulz
from lightning_muon.optim.polar_express import polar_express
from lightning_muon.optim.qdwh import qdwh
from lightning_muon.optim.svd import svd
from lightning_muon.optim.zolo_pd import zolo_pd

Orthogonalizer = Literal["newton_schulz", "polar_express", "gram_newton_schulz", "qdwh", "zolo_pd", "svd"]


class _Method(NamedTuple):
    function: Callable[..., Tensor]
    dtypes: tuple[str, ...]
    # What it computes in by default, elsewhere and on CUDA.
    dtype: torch.dtype
    cuda_dtype: torch.dtype


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FULL = ("float64", "float32")
_METHODS = {
    "newton_schulz": _Method(newton_schulz, tuple(_DTYPES), torch.float32, torch.bfloat16),
    "polar_express": _Method(polar_express, tuple(_DTYPES), torch.float32, torch.bfloat16),
    "gram_newton_schulz": _Method(gram_newton_schulz, (*_FULL, "float16"), torch.float32, torch.float16),
    "qdwh": _Method(qdwh, _FULL, torch.float32, torch.float32),
    "zolo_pd": _Method(zolo_pd, _FULL, torch.float32, torch.float32),
    "svd": _Method(svd, _FULL, torch.float64, torch.float64),
}


def orthogonalize(
    matrix: Tensor,
    method: Orthogonalizer = "newton_schulz",
    *,
    dtype: torch.dtype | str | None = None,
    check_finite: bool = True,
    **options: Any,
) -> Tensor:
    """Compute the (approximate) polar factor U Vᵀ of each matrix U S Vᵀ.

    Each matrix is brought to Frobenius norm one in float32 before the method runs, so neither tiny nor huge entries
    lose digits. Zero matrices give zero.

    Args:
        matrix: Shape (…, m, n): one matrix or a batch of them, of any floating dtype.
        method: ``"newton_schulz"``, the iteration of Muon; ``"polar_express"``, the same with better coefficients;
            ``"gram_newton_schulz"``, the same for long matrices; ``"qdwh"`` or ``"zolo_pd"``, to working precision;
            ``"svd"``, the exact reference. The function of that name says what it costs and gives.
        dtype: Precision of the computation, such as ``torch.float32`` or ``"float32"``. Default: float64 for float64
            input and for ``svd``; else, on CUDA, what its tensor cores are fast at: bfloat16 for ``newton_schulz``,
            where it is what everyone trains with, and for ``polar_express``, float16 for ``gram_newton_schulz``; else
            float32.
        check_finite: Whether to raise an error that names the matrices with NaN or infinite entries. It waits for the
            device, and ``torch.compile`` cannot trace it. Without it, such a matrix comes out as NaN in every entry,
            so that one entry of each tells, and the others of its batch are not touched.
        **options: What the method takes, such as ``steps`` and ``coefficients`` of
            :func:`~lightning_muon.optim.newton_schulz.newton_schulz`.

    Returns:
        Shape (…, m, n), in the dtype of ``matrix``. Differentiability is not promised.

    Raises:
        ValueError: If ``matrix`` has fewer than two dimensions, is not floating point or not finite; or if the method,
            an option or the precision is unknown.

    Example::

        >>> factor = orthogonalize(torch.randn(8, 256, 64))
        >>> torch.linalg.svdvals(factor).max() < 1.2
        tensor(True)
    """
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise ValueError(
            "orthogonalize: expected a real floating-point tensor of shape (..., m, n),"
            f" got {tuple(matrix.shape)} of {matrix.dtype}"
        )
    _check_method(method, {"dtype": dtype, **options})
    if matrix.numel() == 0:
        return matrix.clone()

    batch = matrix.reshape(-1, *matrix.shape[-2:])
    tall = batch.shape[-2] > batch.shape[-1]
    if tall:  # the products of the iteration are cheapest on the smaller side
        batch = batch.mT
    # Lightning's manual optimization steps inside autocast, which would override the precision chosen here.
    with torch.autocast(matrix.device.type, enabled=False):
        normalized = _normalize(batch)
        if check_finite:
            _check_finite(normalized, matrix.shape)
        factor = _METHODS[method].function(normalized.to(working_precision(matrix, method, dtype)), **options)
    return (factor.mT if tall else factor).to(matrix.dtype).reshape(matrix.shape)


def _check_method(method: str, options: dict[str, Any]) -> None:
    """Raise a ValueError that names what is unknown, if ``method`` or one of its ``options`` is."""
    if method not in _METHODS:
        raise ValueError(f"unknown orthogonalizer {method!r}; choose one of {', '.join(get_args(Orthogonalizer))}")
    known = ["dtype", *list(inspect.signature(_METHODS[method].function).parameters)[1:]]
    for option in options:
        if option not in known:
            raise ValueError(f"orthogonalizer {method!r} has no option {option!r}; it takes {', '.join(known)}")
    dtype = options.get("dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in _METHODS[method].dtypes:
        choices = ", ".join(_METHODS[method].dtypes)
        raise ValueError(f"orthogonalizer {method!r} does not run in dtype {str(dtype)!r}; choose one of {choices}")


def working_precision(matrix: Tensor, method: str, wanted: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype in which a method computes the polar factor of a matrix, if this one is wanted, or none."""
    if wanted is not None:
        return wanted if isinstance(wanted, torch.dtype) else _DTYPES[wanted]
    if matrix.dtype == torch.float64:
        return torch.float64
    if matrix.is_mps:  # it has no float64
        return torch.float32
    return _METHODS[method].cuda_dtype if matrix.is_cuda else _METHODS[method].dtype


def _normalize(batch: Tensor) -> Tensor:
    """Scale each matrix of ``batch`` (b, m, n) to Frobenius norm one, so that no singular value exceeds one.

    Dividing by the largest entry first keeps the squares from under- and overflowing. After that the norm is at least
    one, except for a zero matrix, which the clamps keep zero: no floor distorts a small gradient. A matrix with a NaN
    or an infinity becomes NaN in every entry.
    """
    batch = batch.to(torch.promote_types(batch.dtype, torch.float32))
    largest = torch.linalg.vector_norm(batch, torch.inf, dim=(-2, -1), keepdim=True)
    scaled = batch / largest.clamp_min(torch.finfo(batch.dtype).tiny)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    normalized: Tensor = scaled.div_(norm.clamp_min_(1.0))
    return normalized


def _check_finite(normalized: Tensor, shape: torch.Size) -> None:
    """Raise a ValueError that names the matrices which ``_normalize`` has made NaN."""
    broken = normalized[:, 0, 0].isnan()
    if broken.any():
        indices = [tuple(index) for index in broken.reshape(shape[:-2]).nonzero().tolist()]
        which = "the matrix" if len(shape) == 2 else f"matrices {', '.join(map(str, indices))} of the batch"
        raise ValueError(f"orthogonalize: NaN or infinite entries in {which} of shape {tuple(shape)}")
