"""All methods on random matrices of every dtype, shape, size and condition, against the SVD in float64."""

import random
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.orthogonalize import OrthogonalizerName
from lightning_muon.optim.polar.quintics import Quintic, optimal_composition, quintics

METHODS = get_args(OrthogonalizerName)
EXACT = {"qdwh", "zolo_pd", "svd"}
# Decimal exponents of the entries: from denormal numbers to just below the overflow.
EXPONENTS = {torch.float64: (-318, 306), torch.float32: (-42, 36), torch.bfloat16: (-38, 36), torch.float16: (-6, 3)}
# Options of each method; of the iterations with their schedule, and where it leaves singular values of at least 0.01.
Schedule = tuple[dict[str, Any], tuple[Quintic, ...], tuple[float, float]]
NEWTON_SCHULZ: list[Schedule] = [
    ({}, quintics("keller_jordan", 5), (0.68, 1.135)),
    ({"coefficients": "modded_nanogpt"}, quintics("modded_nanogpt", 5), (0.97, 1.033)),
    ({"coefficients": "cubic", "steps": 18}, quintics("cubic", 18), (0.99, 1.0)),
    ({"coefficients": "polar_express", "steps": 6}, quintics("polar_express", 6), (0.99, 1.01)),
]
POLAR_EXPRESS: list[Schedule] = [
    ({}, optimal_composition(5), (0.85, 1.13)),
    ({"steps": 4, "lower_bound": 0.01}, optimal_composition(4, 0.01), (0.83, 1.17)),
    ({"steps": 8, "restart_every": 3}, optimal_composition(8), (0.99, 1.01)),
]
SCHEDULES = {"newton_schulz": NEWTON_SCHULZ, "gram_newton_schulz": NEWTON_SCHULZ, "polar_express": POLAR_EXPRESS}
BATCHES = 15


class Case(NamedTuple):
    batch: Tensor  # of shape (..., m, n)
    options: dict[str, Any]
    schedule: tuple[Quintic, ...]  # of an iteration
    band: tuple[float, float]  # where it leaves singular values of at least 0.01
    written: str  # where the factor goes: "new", "other" or "in place"


def cases(method: str, dtype: torch.dtype) -> Iterator[Case]:
    """Draw batches with one matrix of each kind, in random order."""
    draw = random.Random(f"{method} {dtype}")  # noqa: S311
    torch.manual_seed(draw.randrange(2**31))
    for _ in range(BATCHES):
        m, n = draw.choice([(1, draw.randint(1, 40)), (draw.randint(1, 40), 1), (24, 24), (9, 40), (31, 12), (16, 50)])
        rank = min(m, n)
        kinds = [
            torch.linspace(0.5, 1, rank, dtype=torch.float64),
            torch.logspace(0, -draw.uniform(1, 3), rank, dtype=torch.float64),
            torch.logspace(0, -draw.uniform(4, 14), rank, dtype=torch.float64),
            torch.cat([torch.ones(1), torch.zeros(rank - 1)]).double(),  # of rank one
            torch.zeros(rank, dtype=torch.float64),
        ]
        draw.shuffle(kinds)
        matrices = [random_matrix(singular_values, m, n) for singular_values in kinds]
        low, high = EXPONENTS[dtype]
        sizes = [draw.choice([low, high, draw.uniform(low, high), 0.0]) for _ in matrices]
        batch = torch.stack([(matrix * 10.0**size).to(dtype) for matrix, size in zip(matrices, sizes, strict=True)])
        schedule = draw.choice(SCHEDULES.get(method, [({}, (), (1.0, 1.0))]))
        yield Case(laid_out(batch, draw.randrange(4)), *schedule, draw.choice(["new", "other", "in place"]))


def random_matrix(singular_values: Tensor, m: int, n: int) -> Tensor:
    """Make a matrix from its singular values, with a largest entry of one."""
    rank = min(m, n)
    u = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64)).Q
    matrix = u * singular_values @ v.mT
    largest: Tensor = matrix.abs().max()
    return matrix / largest.where(largest > 0, 1)


def laid_out(batch: Tensor, way: int) -> Tensor:
    """Return equal matrices in another layout of memory."""
    if way == 1:
        return batch.mT.contiguous().mT
    if way == 2:  # every second column of a wider tensor
        wider = torch.full((*batch.shape[:-1], 2 * batch.shape[-1]), 7.0, dtype=batch.dtype)
        wider[..., ::2] = batch
        return wider[..., ::2]
    if way == 3:  # more batch dimensions, not contiguous
        return torch.stack([batch, batch.flip(0)]).transpose(0, 1)
    return batch


def svd_of(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose each matrix in float64, divided by its largest entry, which overflows nothing."""
    wide = batch.double()
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(wide / largest.where(largest > 0, 1), full_matrices=False)
    return u, s, vh.mT


def factors_of(method: Any, case: Case, **options: Any) -> Tensor:
    batch = case.batch.clone(memory_format=torch.preserve_format)
    if case.written == "in place":
        factor = orthogonalize(batch, method, out=batch, **case.options, **options)
        assert factor is batch
        return factor
    other = torch.full_like(batch, 5.0) if case.written == "other" else None
    factor = orthogonalize(batch, method, out=other, **case.options, **options)
    assert other is None or factor is other
    assert torch.equal(batch, case.batch)
    return factor


@pytest.mark.parametrize("dtype", EXPONENTS)
@pytest.mark.parametrize("method", sorted(EXACT))
def test_exact_methods_give_the_polar_factor(method: str, dtype: torch.dtype) -> None:
    working = 2**-52 if dtype == torch.float64 else 2**-23
    for case in cases(method, dtype):
        factor = factors_of(method, case)
        u, s, v = svd_of(case.batch)
        assert factor.dtype == dtype
        rounding = 2 * torch.finfo(dtype).eps + 50 * working
        assert torch.linalg.matrix_norm(factor.double(), 2).max() < 1 + rounding
        # Singular vectors of values that lie above the rounding of the input, which moves a factor by condition times
        # epsilon. Their values are one: Uᵀ O V is the identity there.
        smallest = 1e-3
        clear = (s > smallest * s[..., :1]).double()
        aligned = clear.unsqueeze(-1) * (u.mT @ factor.double() @ v) * clear.unsqueeze(-2)
        error = (aligned - torch.diag_embed(clear)).abs().amax()
        assert error < rounding + working / smallest
        assert factor[s[..., 0] == 0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", EXPONENTS)
@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz", "polar_express"])
def test_iterations_apply_their_polynomial_to_singular_values_alone(method: str, dtype: torch.dtype) -> None:
    working = 2**-52 if dtype == torch.float64 else 2**-23
    for case in cases(method, dtype):
        schedule, (low, high) = case.schedule, case.band
        factor = factors_of(method, case).double()
        u, s, v = svd_of(case.batch)
        power = 8 if method == "polar_express" else 2
        norms = s.pow(power).sum(-1, keepdim=True).pow(1 / power)
        start = s / norms.where(norms > 0, 1)
        end = start
        for a, b, c in schedule:
            end = end * (a + end**2 * (b + end**2 * c))
        # Rounding of the smallest singular values grows as they do.
        slope = prod(a for a, _, _ in schedule)
        rounding = 2 * torch.finfo(dtype).eps + 3 * slope * working
        expected = u * end.unsqueeze(-2) @ v.mT
        assert torch.linalg.matrix_norm(factor - expected, 2).max() < rounding, case.options
        values = (u.mT @ factor @ v).diagonal(dim1=-2, dim2=-1)[start > 0.01]
        assert values.min() > low - rounding
        assert values.max() < high + rounding
        assert factor[s[..., 0] == 0].count_nonzero() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", EXPONENTS)
def test_the_size_of_a_matrix_changes_no_digit(method: str, dtype: torch.dtype) -> None:
    """Multiplied by powers of two, which are exact, together with matrices of other sizes."""
    low, high = (3.32 * exponent for exponent in EXPONENTS[dtype])
    low += 10 - torch.finfo(dtype).eps.as_integer_ratio()[1].bit_length()  # as many bits above the denormal numbers
    torch.manual_seed(1)
    matrix = torch.randn(10, 14).clamp(-3, 3).to(dtype)
    matrix = matrix.where(matrix.abs() > 0.1, 0.5)
    normal = torch.finfo(dtype).smallest_normal
    exponents = [e for e in (low, low / 2, -3, 0, 5, high / 2, high - 1) if 0.1 * 2.0 ** int(e) > normal]
    batch = torch.stack([(matrix.double() * 2.0 ** int(exponent)).to(dtype) for exponent in exponents])
    assert len(exponents) > 4
    for factor in orthogonalize(batch, method):  # type: ignore[arg-type]
        torch.testing.assert_close(factor, orthogonalize(matrix, method), atol=1e-6, rtol=0)  # type: ignore[arg-type]
