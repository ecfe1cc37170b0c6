"""One door to every way of computing the polar factor of a matrix."""

import inspect
from collections.abc import Callable
from functools import cache
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
    # What it computes in by default: where matrix products are fast in half precision (CUDA, some CPUs), and elsewhere.
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
MOST_SHAPES = 1024
# Norms between which no square of an entry that matters leaves the range of float32, from 1e-38 to 3e38.
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

    Each matrix is brought to Frobenius norm one in float32 before the method runs, so neither tiny nor huge entries
    lose digits. Zero matrices give zero.

    Args:
        matrix: Shape (…, m, n): one matrix or a batch of them, of any floating dtype.
        method: ``"newton_schulz"``, the iteration of Muon; ``"polar_express"``, the same with better coefficients;
            ``"gram_newton_schulz"``, the same for long matrices; ``"qdwh"`` or ``"zolo_pd"``, to working precision;
            ``"svd"``, the exact reference. The function of that name says what it costs and gives.
        dtype: Precision of the computation, such as ``torch.float32`` or ``"float32"``. Default: float64 for float64
            input and for ``svd``; float32 for ``qdwh`` and ``zolo_pd``. The others compute in half precision where
            the hardware multiplies in it: on CUDA in bfloat16, as everyone trains with (``gram_newton_schulz`` in
            float16, which allows longer runs); in bfloat16 on CPUs that have its instructions; else in float32.
        check_finite: Whether to raise an error that names the matrices with NaN or infinite entries. It waits for the
            device, and ``torch.compile`` cannot trace it. Without it, such a matrix comes out as NaN in every entry,
            so that one entry of each tells, and the others of its batch are not touched.
        compile: Whether ``torch.compile`` translates the method, once for each shape: for GPUs, where it fuses what
            lies between the products.
        out: Where the factor is written: a tensor like ``matrix``, or ``matrix`` itself, which saves a copy of it.
        **options: What the method takes, such as ``steps`` and ``coefficients`` of
            :func:`~lightning_muon.optim.newton_schulz.newton_schulz`.

    Returns:
        Shape (…, m, n), in the dtype of ``matrix``. Differentiability is not promised.

    Raises:
        ValueError: If ``matrix`` has fewer than two dimensions, is not floating point or not finite; if ``out`` is not
            like it; or if the method, an option or the precision is unknown.

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
    if tall:  # the products of the iteration are cheapest on the smaller side
        batch = batch.mT
    # Lightning's manual optimization steps inside autocast, which would override the precision chosen here.
    with torch.autocast(matrix.device.type, enabled=False):
        normalized = _normalize(batch, in_place=out is matrix)
        if check_finite:
            _check_finite(normalized, matrix.shape)
        run = _compiled(method) if compile else _METHODS[method].function
        factor = run(normalized.to(working_precision(matrix, method, dtype)), **options)
    factor = (factor.mT if tall else factor).reshape(matrix.shape)
    return factor.to(matrix.dtype) if out is None else out.copy_(factor)


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
    if matrix.is_cuda:
        return _METHODS[method].cuda_dtype
    return _METHODS[method].fast_cpu_dtype if matrix.is_cpu and _cpu_multiplies_bfloat16() else _METHODS[method].dtype


@cache
def _compiled(method: str) -> Callable[..., Tensor]:
    """Return a method, compiled for each shape and set of options that it meets."""
    compiled = torch.compile(_METHODS[method].function, dynamic=False)

    def run(matrix: Tensor, **options: Any) -> Tensor:
        # A model has more shapes than torch would compile for; beyond its limit it would fall back, with a warning.
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            factor: Tensor = compiled(matrix, **options)
        return factor

    return run


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; torch knows, but has no public name for it."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported is not None and supported() for supported in asked)


def _normalize(batch: Tensor, in_place: bool) -> Tensor:
    """Scale each matrix of ``batch`` (b, m, n) to Frobenius norm one, so that no singular value exceeds one.

    No floor distorts a small gradient. A matrix with a NaN or an infinity becomes NaN in every entry.
    """
    wide = batch.to(torch.promote_types(batch.dtype, torch.float32))
    norms = _norms(wide).to(wide.dtype).clamp_min(torch.finfo(wide.dtype).tiny).view(-1, 1, 1)
    return wide.div_(norms) if in_place else wide / norms


def _norms(batch: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix of ``batch`` (b, m, n), NaN for one with a NaN or an infinity.

    In float64 the squares of float32 neither under- nor overflow. A CPU is slow at that, and may look first whether
    float32 does.
    """
    if batch.is_cpu and batch.dtype == torch.float32 and not torch.compiler.is_compiling():
        fast = torch.stack(torch._foreach_norm(batch.unbind()))
        if ((fast > _SAFE_NORMS[0]) & (fast < _SAFE_NORMS[1])).all():
            return fast
    norms: Tensor = torch.linalg.vector_norm(batch, dim=(-2, -1), dtype=torch.float64)
    return norms.masked_fill_(norms.isinf(), torch.nan)


def _check_finite(normalized: Tensor, shape: torch.Size) -> None:
    """Raise a ValueError that names the matrices which ``_normalize`` has made NaN."""
    broken = normalized[:, 0, 0].isnan()
    if broken.any():
        indices = [tuple(index) for index in broken.reshape(shape[:-2]).nonzero().tolist()]
        which = "the matrix" if len(shape) == 2 else f"matrices {', '.join(map(str, indices))} of the batch"
        raise ValueError(f"orthogonalize: NaN or infinite entries in {which} of shape {tuple(shape)}")
