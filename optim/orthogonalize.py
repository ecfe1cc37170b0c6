"""One door to every way of computing the polar factor of a matrix."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_muon.optim.newton_schulz import newton_schulz

Orthogonalizer = Literal["newton_schulz", "svd"]


def svd(matrix: Tensor) -> Tensor:
    """Compute the polar factor U Vᵀ from the singular value decomposition: exact, slow, the reference for the others.

    Singular values at the level of rounding count as zero, so that a rank-deficient matrix has the polar factor of its
    own row and column space: zero stays zero.

    Args:
        matrix: Shape (batch, m, n).

    Returns:
        Shape (batch, m, n).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rounding = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:])
    in_range = (s > rounding * s.amax(dim=-1, keepdim=True)).to(matrix.dtype)
    factor: Tensor = (u * in_range.unsqueeze(-2)) @ vh
    return factor


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_METHODS: dict[str, Callable[..., Tensor]] = {"newton_schulz": newton_schulz, "svd": svd}


def orthogonalize(
    matrix: Tensor, method: Orthogonalizer = "newton_schulz", *, dtype: torch.dtype | str | None = None, **options: Any
) -> Tensor:
    """Compute the (approximate) polar factor U Vᵀ of each matrix U S Vᵀ.

    Each matrix is brought to Frobenius norm one in float32 before the method runs, so neither tiny nor huge entries
    lose digits. Zero matrices give zero.

    Args:
        matrix: Shape (…, m, n): one matrix or a batch of them, of any floating dtype.
        method: ``"newton_schulz"``, the iteration of Muon, or ``"svd"``, the exact reference.
        dtype: Precision of the computation, such as ``torch.float32`` or ``"float32"``. Default: float64 for float64
            input; else bfloat16 for Newton–Schulz on CUDA, where it is what everyone trains with; else float32.
        **options: What the method takes, such as ``steps`` and ``coefficients`` of
            :func:`~lightning_muon.optim.newton_schulz.newton_schulz`.

    Returns:
        Shape (…, m, n), in the dtype of ``matrix``. Differentiability is not promised.

    Raises:
        ValueError: If ``matrix`` has fewer than two dimensions or is not floating point, or if the method or an option
            is unknown.

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
    check_method(method, {"dtype": dtype, **options})
    if matrix.numel() == 0:
        return matrix.clone()

    batch = matrix.reshape(-1, *matrix.shape[-2:])
    tall = batch.shape[-2] > batch.shape[-1]
    if tall:  # the products of the iteration are cheapest on the smaller side
        batch = batch.mT
    factor = _METHODS[method](_normalize(batch, _precision(matrix, method, dtype)), **options)
    return (factor.mT if tall else factor).to(matrix.dtype).reshape(matrix.shape)


def check_method(method: str, options: dict[str, Any]) -> None:
    """Raise a ValueError that names what is unknown, if ``method`` or one of its ``options`` is."""
    if method not in _METHODS:
        raise ValueError(f"unknown orthogonalizer {method!r}; choose one of {', '.join(get_args(Orthogonalizer))}")
    known = ["dtype", *list(inspect.signature(_METHODS[method]).parameters)[1:]]
    for option in options:
        if option not in known:
            raise ValueError(f"orthogonalizer {method!r} has no option {option!r}; it takes {', '.join(known)}")
    dtype = options.get("dtype")
    if dtype is not None and not isinstance(dtype, torch.dtype) and dtype not in _DTYPES:
        raise ValueError(f"orthogonalizer {method!r}: unknown dtype {dtype!r}; choose one of {', '.join(_DTYPES)}")


def _precision(matrix: Tensor, method: str, wanted: torch.dtype | str | None) -> torch.dtype:
    if wanted is not None:
        return wanted if isinstance(wanted, torch.dtype) else _DTYPES[wanted]
    if matrix.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if method == "newton_schulz" and matrix.is_cuda else torch.float32


def _normalize(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale each matrix of ``batch`` (b, m, n) to Frobenius norm one, so that no singular value exceeds one.

    Dividing by the largest entry first keeps the squares from under- and overflowing. After that the norm is at least
    one, except for a zero matrix, which the clamps keep zero: no floor distorts a small gradient.
    """
    batch = batch.to(torch.promote_types(batch.dtype, torch.float32))
    largest = batch.abs().amax(dim=(-2, -1), keepdim=True)
    batch = batch / largest.clamp_min(torch.finfo(batch.dtype).tiny)
    norm = torch.linalg.matrix_norm(batch, keepdim=True)
    normalized: Tensor = batch / norm.clamp_min(1.0)
    return normalized.to(dtype)
