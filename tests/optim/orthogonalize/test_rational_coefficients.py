"""The weights of QDWH and the coefficients of ZOLO-PD, as functions of the lower bound."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.exact import (
    RationalStep,
    _apply,
    _inverse_of_triangle,
    _iterate,
    halley_steps,
    halley_weights,
    zolotarev_step,
    zolotarev_steps,
)

LOWER_BOUNDS = [0.9, 0.1, 1e-3, 1e-8, 1e-17]


def value(step: RationalStep, x: Tensor) -> Tensor:
    """Evaluate the function of a step at singular values."""
    fractions = sum(residue / (x * x + shift) for residue, shift in zip(step.residues, step.shifts, strict=True))
    return step.scale * x * (1 + fractions)


@pytest.mark.parametrize("lower", LOWER_BOUNDS)
def test_the_weighted_halley_step_is_zolotarevs_function_of_lowest_degree(lower: float) -> None:
    """Elliptic functions on one side, a closed form on the other."""
    a, b, c = halley_weights(lower)
    step, image = zolotarev_step(lower, 1, ill_conditioned=True)
    assert step.shifts[0] == pytest.approx(1 / c, rel=1e-12)
    assert step.scale == pytest.approx(b / c, rel=1e-12)
    assert image == pytest.approx(lower * (a + b * lower**2) / (1 + c * lower**2), rel=1e-12)


@pytest.mark.parametrize("terms", [1, 2, 4, 8])
@pytest.mark.parametrize("lower", LOWER_BOUNDS)
def test_zolotarevs_function_equioscillates(lower: float, terms: int) -> None:
    """On [lower, 1] it swings 2·terms + 1 times between its value at ``lower`` and one, and never leaves that band."""
    step, image = zolotarev_step(lower, terms, ill_conditioned=True)
    x = torch.logspace(torch.tensor(lower, dtype=torch.float64).log10().item(), 0, 400_001, dtype=torch.float64)
    y = value(step, x)
    rounding = 1e-12
    assert y.min() > image - rounding
    assert y.max() < 1 + rounding
    if 1 - image > 1e-6:  # else there is nothing left to see above rounding
        near_top, near_bottom = y > 1 - 1e-3 * (1 - image), y < image + 1e-3 * (1 - image)
        marks = near_top.int() - near_bottom.int()
        marks = marks[marks != 0]
        assert (marks[1:] != marks[:-1]).sum() == 2 * terms + 1


@pytest.mark.parametrize("epsilon", [2.0**-23, 2.0**-52])
@pytest.mark.parametrize("lower", [0.5, 1e-3, 1e-8, 1e-12, 1e-17])
def test_the_steps_bring_everything_above_the_bound_to_one(lower: float, epsilon: float) -> None:
    start = torch.logspace(torch.tensor(lower, dtype=torch.float64).log10().item(), 0, 10_001, dtype=torch.float64)
    for steps in (halley_steps(lower, epsilon), zolotarev_steps(lower, epsilon)):
        x = start
        for step in steps:
            x = value(step, x)
        assert (x - 1).abs().max() < 10 * epsilon + 1e-13


def test_the_numbers_of_steps_and_terms_are_the_published_ones() -> None:
    """At most six Halley steps, and two of Zolotarev with eight terms, for condition 10¹⁶ in float64."""
    halley, zolotarev = halley_steps(1e-16, 2.0**-52), zolotarev_steps(1e-16, 2.0**-52)
    assert len(halley) == 6
    assert [step.ill_conditioned for step in halley[:2]] == [True, True]
    assert not halley[-1].ill_conditioned
    assert len(zolotarev) == 2
    assert len(zolotarev[0].shifts) == 8


@pytest.mark.parametrize("in_float64", [True, False])
@pytest.mark.parametrize("condition", [1e1, 1e4, 1e7])
def test_ill_conditioned_steps_of_float32_keep_the_factor_itself(
    condition: float, in_float64: bool, with_spectrum: Any, polar_error: Any
) -> None:
    """By QR factorizations in float32 the backward error is small, but the factor is off by the condition."""
    torch.manual_seed(0)
    size = 96
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    values /= values.square().sum().sqrt()  # as it gets them: the division would round
    matrix = with_spectrum(values, size, size).float()
    steps = halley_steps(1e-8, torch.finfo(torch.float32).eps)
    error = polar_error(matrix, _apply(steps, matrix.unsqueeze(0), in_float64).squeeze(0))
    assert max(error.orthogonality, error.backward) < 1e-5
    assert error.forward < (1e-5 if in_float64 else 1e-6 * condition)


@pytest.mark.parametrize("sides", [(64, 64), (48, 160)], ids=str)
def test_wide_matrices_need_no_reduction(sides: tuple[int, int]) -> None:
    """As on a GPU."""
    torch.manual_seed(0)
    matrix = torch.randn(1, *sides) / 100
    steps = halley_steps(1e-8, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(_apply(steps, matrix, True), _iterate(matrix, steps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 130, 300])
def test_a_triangle_is_inverted_by_its_blocks(size: int) -> None:
    """As on a GPU."""
    torch.manual_seed(0)
    square = torch.randn(2, 3, size, size, dtype=torch.float64)
    triangles = torch.linalg.cholesky(square @ square.mT + torch.eye(size))
    inverses = _inverse_of_triangle(triangles)
    assert not inverses.triu(1).any()
    torch.testing.assert_close(
        inverses @ triangles, torch.eye(size, dtype=torch.float64).expand_as(square), rtol=0, atol=1e-13
    )


def test_steps_whose_shift_is_too_small_for_float64_are_made_by_qr_factorizations() -> None:
    """Else a Cholesky factorization would fail, and give NaN, for a matrix without full rank."""
    torch.manual_seed(0)
    matrix = torch.randn(60, 3) @ torch.randn(3, 80)
    for method, options in (("zolo_pd", {}), ("qdwh", {"lower_bound": 1e-20}), ("qdwh", {})):
        values = torch.linalg.svdvals(orthogonalize(matrix, method, **options))  # type: ignore[arg-type]
        assert values.isfinite().all()
        torch.testing.assert_close(values[:3], torch.ones(3))
