"""Dispatch to the polar-factor methods: checks, normalization, working precision, compilation."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_muon.optim.polar.exact import qdwh, svd, zolo_pd
from lightning_muon.optim.polar.newton_schulz import gram_newton_schulz, newton_schulz, polar_express

Orthogonalizer = Literal["newton_schulz", "polar_express", "gram_newton_schulz", "qdwh", "zolo_pd", "svd"]


class _Method(NamedTuple):
    function: Callable[..., Tensor]
    dtypes: tuple[str, ...]
    # The default precision: where matrix products are fast in half precision (CUDA, some CPUs), and elsewhere.
    cuda_dtype: torch.dtype
    fast_cpu_dtype: torch.dtype
    dtype: torch.dtype


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FULL = ("float64", "float32")
_BF16, _FP16, _FP32, _FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
_METHODS = {
    "newton_schulz": _Method(newton_schulz, tuple(_DTYPES), _BF16, _BF16, _FP32),
    "polar_express": _Method(polar_express, tuple(_DTYPES), _BF16, _BF16, _FP32),
    "gram_newton_schulz": _Method(gram_newton_schulz, tuple(_DTYPES), _FP16, _BF16, _FP32),
    "qdwh": _Method(qdwh, _FULL, _FP32, _FP32, _FP32),
    "zolo_pd": _Method(zolo_pd, _FULL, _FP32, _FP32, _FP32),
    "svd": _Method(svd, _FULL, _FP64, _FP64, _FP64),
}
# Shapes for which a method is compiled; a model has more than torch's own limit of 8.
MOST_SHAPES = 1024
# Between these norms the squares of all entries that matter are inside the range of float32, 1e-38 to 3e38.
_SAFE_NORMS = 1e-12, 1e18


def orthogonalize(
    matrix: Tensor,
    method: Orthogonalizer = "newton_schulz",
    *,
    dtype: torch.dtype | str | None = None,
    check_finite: bool = True,
    compile: bool = False,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute the (approximate) polar factor U Vᵀ of each matrix U S Vᵀ.

    Each matrix is scaled to Frobenius norm one in at least float32 before the method runs, so neither tiny nor huge
    entries lose digits. Zero matrices give zero.

    Args:
        matrix: Shape (…, m, n): one matrix or a batch of them, of any real floating dtype.
        method: ``"newton_schulz"``, the iteration of Muon; ``"polar_express"``, the same with better coefficients;
            ``"gram_newton_schulz"``, the same for long matrices; ``"qdwh"`` or ``"zolo_pd"``, to working precision;
            ``"svd"``, the exact reference. The function of that name documents cost and error.
        dtype: Precision of the computation, such as ``torch.float32`` or ``"float32"``. Default: float64 for float64
            input and for ``svd``; float32 for ``qdwh`` and ``zolo_pd``. The others compute in half precision where the
            hardware has matrix products in it: on CUDA in bfloat16 (``gram_newton_schulz`` in float16, which allows
            longer runs); in bfloat16 on CPUs that have its instructions; else in float32.
        check_finite: Whether to raise an error that names the matrices with NaN or infinite entries. The check waits
            for the device, and ``torch.compile`` cannot trace it. Without it, such a matrix gives NaN in every entry;
            the other matrices of the batch are not affected.
        compile: Whether to run the method through ``torch.compile``, once for each shape: for GPUs, where it fuses the
            operations between the products.
        out: Where the factor is written: a tensor like ``matrix``, or ``matrix`` itself, which saves a copy.
        **options: Options of the method, such as ``steps`` and ``coefficients`` of
            :func:`~lightning_muon.optim.polar.newton_schulz.newton_schulz`.

    Returns:
        Shape (…, m, n), in the dtype of ``matrix``. It need not be differentiable.

    Raises:
        ValueError: If ``matrix`` has fewer than two dimensions, is not floating point or not finite; if ``out`` differs
            from it in shape, dtype or device; or if the method, an option or the precision is unknown.

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
    if out is not None and (out.shape != matrix.shape or out.dtype != matrix.dtype or out.device != matrix.device):
        raise ValueError(
            f"orthogonalize: out must be like the matrix, {tuple(matrix.shape)} of {matrix.dtype} on {matrix.device};"
            f" got {tuple(out.shape)} of {out.dtype} on {out.device}"
        )
    if matrix.numel() == 0:
        return matrix.clone() if out is None else out

    batch = matrix.reshape(-1, *matrix.shape[-2:])
    tall = batch.shape[-2] > batch.shape[-1]
    if tall:  # products with the smaller side are the cheapest
        batch = batch.mT
    # In Lightning's manual optimization a step runs inside autocast, which would override the precision chosen here.
    with torch.autocast(matrix.device.type, enabled=False):
        normalized = _normalize(batch, in_place=out is matrix)
        if check_finite:
            _check_finite(normalized, matrix.shape)
        run = _compiled(method) if compile else _METHODS[method].function
        factor = run(normalized.to(working_precision(matrix, method, dtype)), **options)
    factor = (factor.mT if tall else factor).reshape(matrix.shape)
    return factor.to(matrix.dtype) if out is None else out.copy_(factor)


def _check_method(method: str, options: dict[str, Any]) -> None:
    """Raise a ValueError if ``method`` or one of its ``options`` is unknown."""
    if method not in _METHODS:
        raise ValueError(f"unknown orthogonalizer {method!r}; choose one of {', '.join(get_args(Orthogonalizer))}")
    known = _options_of(method)
    for option in options:
        if option not in known:
            raise ValueError(f"orthogonalizer {method!r} has no option {option!r}; it takes {', '.join(known)}")
    dtype = options.get("dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in _METHODS[method].dtypes:
        choices = ", ".join(_METHODS[method].dtypes)
        raise ValueError(f"orthogonalizer {method!r} does not run in dtype {str(dtype)!r}; choose one of {choices}")


@cache
def _options_of(method: str) -> tuple[str, ...]:
    return ("dtype", *list(inspect.signature(_METHODS[method].function).parameters)[1:])


def working_precision(matrix: Tensor, method: str, wanted: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype in which a method computes for an input: the ``wanted`` one, or the default for ``None``."""
    if wanted is not None:
        return wanted if isinstance(wanted, torch.dtype) else _DTYPES[wanted]
    if matrix.dtype == torch.float64:
        return torch.float64
    if matrix.is_mps:  # it has no float64
        return torch.float32
    if matrix.is_cuda:
        return _METHODS[method].cuda_dtype
    return _METHODS[method].fast_cpu_dtype if matrix.is_cpu and _cpu_multiplies_bfloat16() else _METHODS[method].dtype


@cache
def _compiled(method: str) -> Callable[..., Tensor]:
    """Return a method, compiled once for each shape and set of options."""
    compiled = torch.compile(_METHODS[method].function, dynamic=False)

    def run(matrix: Tensor, **options: Any) -> Tensor:
        # Beyond its limit torch would fall back to the uncompiled method, with a warning.
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            factor: Tensor = compiled(matrix, **options)
        return factor

    return run


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16; torch has only private names for that."""
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(is_supported is not None and is_supported() for is_supported in tests)


def _normalize(batch: Tensor, in_place: bool) -> Tensor:
    """Scale each matrix of ``batch`` (b, m, n) to Frobenius norm one, so that no singular value exceeds one.

    The norm has no floor that would distort small gradients. A matrix with NaN or infinity becomes NaN in every entry.
    """
    wide = batch.to(torch.promote_types(batch.dtype, torch.float32))
    norms = _norms(wide).to(wide.dtype).clamp_min(torch.finfo(wide.dtype).tiny).view(-1, 1, 1)
    return wide.div_(norms) if in_place else wide / norms


def _norms(batch: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix of ``batch`` (b, m, n), NaN for a matrix with NaN or infinity.

    In float64 the squares of float32 neither underflow nor overflow. A CPU is slow in float64, so it first tries
    float32 and checks its range.
    """
    if batch.is_cpu and batch.dtype == torch.float32 and not torch.compiler.is_compiling():
        fast = torch.stack(torch._foreach_norm(batch.unbind()))
        if ((fast > _SAFE_NORMS[0]) & (fast < _SAFE_NORMS[1])).all():
            return fast
    norms: Tensor = torch.linalg.vector_norm(batch, dim=(-2, -1), dtype=torch.float64)
    return norms.masked_fill_(norms.isinf(), torch.nan)


def _check_finite(normalized: Tensor, shape: torch.Size) -> None:
    """Raise a ValueError that names the matrices that ``_normalize`` has made NaN."""
    broken = normalized[:, 0, 0].isnan()
    if broken.any():
        indices = [tuple(index) for index in broken.reshape(shape[:-2]).nonzero().tolist()]
        which = "the matrix" if len(shape) == 2 else f"matrices {', '.join(map(str, indices))} of the batch"
        raise ValueError(f"orthogonalize: NaN or infinite entries in {which} of shape {tuple(shape)}")
