"""Each polar method, in turns with Newton–Schulz, and beside the floor of its FLOPs."""

import math
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import count_flops, product_rate
from benchmarks.gpu.measuring import Measuring
from benchmarks.orthogonalization import METHODS, REFERENCE, Method
from benchmarks.stopwatch import seconds
from lightning_muon.optim import orthogonalize

# Batches as the optimizer makes them: those of GPT-2 small, small matrices, and single large ones.
SHAPES = [(28, 768, 768), (7, 768, 3072), (24, 128, 128), (4, 2048, 2048), (1, 4096, 4096), (1, 2048, 8192)]
TINY_SHAPES = [(2, 16, 16), (1, 16, 32)]
PRECISIONS = ("bfloat16", "float16", "float32", "float64")
# The singular value decomposition of larger batches takes seconds.
LARGEST_SVD = 24 * 128 * 128
COMPILED = ("newton_schulz", "polar_express, 3 steps from 0.02")
ROUNDS = 9
SECONDS = 3.0  # of the rounds of one method
SPAN = 5e-3  # seconds of calls in a row that are timed as one, so that the resolution of the clock does not matter


def measure_methods(measuring: Measuring) -> None:
    """Measure each method by shape and precision, and on a GPU some of them compiled."""
    shapes = TINY_SHAPES if measuring.tiny else SHAPES
    rates: dict[str, float] = {}
    cases = [(shape, precision, name, False) for shape in shapes for precision in PRECISIONS for name in METHODS]
    if measuring.device == "cuda":
        cases += [(shape, "bfloat16", name, True) for shape in shapes[:2] for name in COMPILED]
    named = {
        ", ".join(["×".join(map(str, shape)), precision, *(["compiled"] if compiled else []), name]): case
        for case in cases
        for shape, precision, name, compiled in [case]
        if _is_measured(shape, precision, METHODS[name], name)
    }
    for what in measuring.each(named):
        shape, precision, name, compiled = named[what]
        with measuring.row(what) as row:
            if precision not in rates:
                rates[precision] = product_rate(
                    getattr(torch, precision), measuring.device, 256 if measuring.tiny else None
                )
            row.update(shape="×".join(map(str, shape)), precision=precision)
            row["method"] = f"{name}, compiled" if compiled else name
            row.update(_measure(measuring, shape, precision, METHODS[name], compiled, rates[precision]))


def _is_measured(shape: tuple[int, ...], precision: str, method: Method, name: str) -> bool:
    if name == "svd":  # it computes in float64 by default
        return precision == "float64" and math.prod(shape) <= LARGEST_SVD
    return precision in method.precisions


def _measure(
    measuring: Measuring, shape: tuple[int, ...], precision: str, method: Method, compiled: bool, rate: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "float64" else torch.float32
    matrices = torch.randn(shape, device=measuring.device, dtype=dtype)
    own = partial(run, matrices, precision, method, compiled)
    reference = partial(run, matrices, precision, METHODS[REFERENCE], False)
    flops = count_flops(partial(run, matrices, precision, method, False), FACTORIZATIONS)
    # These calls warm up: libraries choose their kernels.
    warm = [min(seconds(function, measuring.device) for _ in range(2)) for function in (own, reference)]
    calls = [1 if measuring.tiny else _calls(taken) for taken in warm]
    rounds = 2 if measuring.tiny else ROUNDS
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < 2 or (len(times) < rounds and time.perf_counter() - start < SECONDS):
        times.append((seconds(own, measuring.device, calls[0]), seconds(reference, measuring.device, calls[1])))
        if measuring.seconds_left == 0:
            break
    taken = statistics.median(ours for ours, _ in times)
    return {
        "ms": 1e3 * taken,
        "floor ms": 1e3 * flops / rate,
        "× floor": taken * rate / flops,
        "TFLOP/s": flops / taken / 1e12,
        "× newton_schulz": statistics.median(ours / theirs for ours, theirs in times),
        "rounds": len(times),
    }


def run(matrices: Tensor, precision: str, method: Method, compiled: bool) -> Tensor:
    """Compute polar factors."""
    return orthogonalize(
        matrices, method.orthogonalizer, dtype=precision, check_finite=False, compile=compiled, **method.options
    )


def _calls(taken: float) -> int:
    return max(1, min(100, math.ceil(SPAN / max(taken, 1e-6))))


# The FLOPs of factorizations of m×n matrices; Golub & Van Loan, "Matrix Computations" (2013), sections 4.2, 5.2, 8.6.


def _batch(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of matrices, their longer and their shorter side."""
    return math.prod(shape[:-2]), max(shape[-2:]), min(shape[-2:])


def _qr(shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Householder vectors and R: 2mn² − 2n³/3, and as much again for the n columns of Q."""
    batch, m, n = _batch(shape)
    return batch * (4 * m * n**2 - 4 * n**3 // 3)


def _cholesky(shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    batch, m, _n = _batch(shape)
    return batch * m**3 // 3


def _cholesky_inverse(shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """The inverse of the triangle, n³/3, and the product with its transpose."""
    batch, _m, n = _batch(shape)
    return 2 * batch * n**3 // 3


def _solve_triangular(triangle: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
    return math.prod(right) * triangle[-1]


def _svd(shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Singular values with U₁ and V: 14mn² + 8n³."""
    batch, m, n = _batch(shape)
    return batch * (14 * m * n**2 + 8 * n**3)


FACTORIZATIONS: dict[Any, Any] = {
    torch.ops.aten.linalg_qr: _qr,
    torch.ops.aten.linalg_cholesky_ex: _cholesky,
    torch.ops.aten.cholesky_inverse: _cholesky_inverse,
    torch.ops.aten.linalg_solve_triangular: _solve_triangular,
    torch.ops.aten._linalg_svd: _svd,
    torch.ops.aten.linalg_svd: _svd,
}
