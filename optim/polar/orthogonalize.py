"""Dispatch to the polar-factor methods: checks, working precision, compilation."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_muon.optim.polar.exact import qdwh, svd, zolo_pd
from lightning_muon.optim.polar.newton_schulz import gram_newton_schulz, newton_schulz, polar_express
from lightning_muon.optim.polar.normalize import normalize
from lightning_muon.optim.polar.options import check_lower_bound, check_whole, defaults_of
from lightning_muon.optim.polar.quintics import quintics
from lightning_muon.optim.polar.user_function import check_keywords, check_names, name_of, resolve_function

OrthogonalizerName = Literal["newton_schulz", "polar_express", "gram_newton_schulz", "qdwh", "zolo_pd", "svd"]
# A name, the import path of a function, or a function (matrix, **options) -> polar factor.
Orthogonalizer: TypeAlias = OrthogonalizerName | str | Callable[..., Tensor]


class _Method(NamedTuple):
    function: Callable[..., Tensor]
    dtypes: tuple[str, ...]
    # The default precision: where matrix products are fast in half precision (CUDA, some CPUs), and elsewhere.
    cuda_dtype: torch.dtype
    fast_cpu_dtype: torch.dtype
    dtype: torch.dtype
    is_users: bool = False


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


def orthogonalize(
    matrix: Tensor,
    method: Orthogonalizer = "newton_schulz",
    *,
    dtype: torch.dtype | str | None = None,
    check_finite: bool = True,
    compile: bool = False,
    out: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute the (approximate) polar factor U Vᵀ of each matrix U S Vᵀ.

    Each matrix is scaled to Frobenius norm one in at least float32 before the method runs, so neither tiny nor huge
    entries lose digits. Zero matrices give zero.

    Args:
        matrix: Shape (…, m, n): one matrix or a batch of them, in float64, float32, bfloat16 or float16.
        method: ``"newton_schulz"``, the iteration of Muon; ``"polar_express"``, the same with better coefficients;
            ``"gram_newton_schulz"``, the same for long matrices; ``"qdwh"`` or ``"zolo_pd"``, to working precision;
            ``"svd"``, the exact reference. The function of that name documents cost and error. Or a function of your
            own, or its import path ``"package.module.function"``: ``f(matrix, **options)`` gets matrices (b, m, n),
            m ≤ n, of Frobenius norm one (zero where the matrix is zero), and returns their factors in the same shape.
        dtype: Precision of the computation, such as ``torch.float32`` or ``"float32"``. Default: float64 for float64
            input and for ``svd``; float32 for ``qdwh``, ``zolo_pd`` and a function of your own. The others compute in
            half precision where the hardware has matrix products in it: on CUDA in bfloat16 (``gram_newton_schulz`` in
            float16, which allows longer runs); in bfloat16 on CPUs that have its instructions; else in float32.
        check_finite: Whether to raise an error that names the matrices with NaN or infinite entries. The check waits
            for the device, and ``torch.compile`` cannot trace it. Without it, such a matrix gives NaN in every entry;
            the other matrices of the batch are not affected.
        compile: Whether to run the method through ``torch.compile``, once for each shape: for GPUs, where it fuses the
            operations between the products.
        out: Where the factor is written: a tensor like ``matrix``, or ``matrix`` itself, which saves a copy. With an
            error it is unchanged.
        mask: Boolean, shape (…): where it is false, the factor is zero, or NaN if it is not finite. Default: all true.
        **options: Options of the method, such as ``steps`` and ``coefficients`` of
            :func:`~lightning_muon.optim.polar.newton_schulz.newton_schulz`; of a function of your own, those of its
            signature.

    Returns:
        Shape (…, m, n), in the dtype of ``matrix``. It need not be differentiable.

    Raises:
        ValueError: If ``matrix`` has fewer than two dimensions, another dtype, or is not finite; if ``out`` differs
            from it in shape, dtype or device, or ``mask`` has another shape; if the method, an option or the precision
            is unknown or out of range; or if a function of your own returns something else than a tensor of the shape
            it got.

    Example::

        >>> factor = orthogonalize(torch.randn(8, 256, 64))
        >>> torch.linalg.svdvals(factor).max() < 1.2
        tensor(True)
    """
    if not isinstance(matrix, Tensor) or matrix.ndim < 2 or matrix.dtype not in _DTYPES.values():
        raise ValueError(
            f"orthogonalize: matrix must be a tensor of {', '.join(_DTYPES)}, of shape (..., m, n),"
            f" got {_description(matrix)}"
        )
    check_method(method, {"dtype": dtype, **options})
    if out is not None and _description(out) != _description(matrix):
        raise ValueError(f"orthogonalize: out must be like the matrix, {_description(matrix)}; got {_description(out)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != matrix.shape[:-2]):
        raise ValueError(
            f"orthogonalize: mask must be boolean, of shape {tuple(matrix.shape[:-2])}; got {_description(mask)}"
        )
    if matrix.numel() == 0:
        return matrix.clone() if out is None else out

    chosen = _find(method)
    batch = matrix.reshape(-1, *matrix.shape[-2:])
    tall = batch.shape[-2] > batch.shape[-1]
    if tall:  # products with the smaller side are the cheapest
        batch = batch.mT
    shown = None if mask is None else mask.reshape(-1)
    # In Lightning's manual optimization a step runs inside autocast, which would override the precision chosen here.
    with torch.autocast(matrix.device.type, enabled=False):
        normalized = normalize(
            batch,
            working_precision(matrix, method, dtype),
            in_place=out is matrix and not chosen.is_users,
            shape=tuple(matrix.shape) if check_finite else None,
            mask=None if chosen.is_users else shown,
        )
        run = _compiled(chosen.function) if compile else chosen.function
        factor = run(normalized, **options)
    if chosen.is_users:
        _check_returned(factor, batch, chosen.function)
        if shown is not None:  # it may make something of zero
            factor = factor * shown.view(-1, 1, 1)
    factor = (factor.mT if tall else factor).reshape(matrix.shape)
    return factor.to(matrix.dtype) if out is None else out.copy_(factor)


def _description(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"


def check_method(method: Orthogonalizer, options: Mapping[str, Any]) -> None:
    """Check a method and its options without computing anything.

    Args:
        method: As for :func:`orthogonalize`.
        options: The options of the method, and ``dtype``.

    Raises:
        ValueError: If the method is unknown or cannot be imported, or an option is unknown or has a bad value. Those of
            the values of a user's function are its own.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"orthogonalizer_options must be names and values, got {options!r}")
    chosen = _find(method)
    label = f"orthogonalizer {method if isinstance(method, str) else name_of(method)!r}"
    dtype = options.get("dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in chosen.dtypes:
        raise ValueError(f"{label} does not run in dtype {str(dtype)!r}; choose one of {', '.join(chosen.dtypes)}")
    if chosen.is_users:
        check_keywords(chosen.function, label, {name: value for name, value in options.items() if name != "dtype"})
        return
    if not options.keys() - {"dtype"}:
        return
    defaults = defaults_of(chosen.function)
    check_names(label, ("dtype", *defaults), options)
    values = {**defaults, **options}
    # The methods check their options too, but only when the matrix may already have been overwritten.
    for name in {"steps", "restart_every"} & options.keys():
        check_whole(name, options[name])
    if values.get("lower_bound") is not defaults.get("lower_bound"):
        check_lower_bound(values["lower_bound"])
    if "coefficients" in values:
        quintics(values["coefficients"], values["steps"])


def _find(method: Orthogonalizer) -> _Method:
    if isinstance(method, str) and method in _METHODS:
        return _METHODS[method]
    function = resolve_function(method, "orthogonalizer", get_args(OrthogonalizerName))
    return _Method(function, tuple(_DTYPES), _FP32, _FP32, _FP32, is_users=True)


def _check_returned(factor: object, batch: Tensor, function: Callable[..., Tensor]) -> None:
    """Raise a ValueError if a user's function has not returned a tensor of the shape that it got."""
    if isinstance(factor, Tensor) and factor.shape == batch.shape and factor.is_floating_point():
        return
    raise ValueError(
        f"orthogonalizer {name_of(function)!r} must return a real tensor of shape {tuple(batch.shape)},"
        f" got {_description(factor)}"
    )


def working_precision(matrix: Tensor, method: Orthogonalizer, wanted: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype in which a method computes for an input: the ``wanted`` one, or the default for ``None``."""
    if wanted is not None:
        return wanted if isinstance(wanted, torch.dtype) else _DTYPES[wanted.removeprefix("torch.")]
    if matrix.dtype == torch.float64:
        return torch.float64
    if matrix.is_mps:  # it has no float64
        return torch.float32
    chosen = _find(method)
    if matrix.is_cuda:
        return chosen.cuda_dtype
    return chosen.fast_cpu_dtype if matrix.is_cpu and _cpu_multiplies_bfloat16() else chosen.dtype


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a method, compiled once for each shape and set of options."""
    compiled = torch.compile(function, dynamic=False)

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
