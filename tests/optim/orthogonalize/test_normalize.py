"""Norm one over the whole range of every dtype, on every device's way, for each matrix as if it were alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar import normalize as module
from lightning_muon.optim.polar.normalize import normalize

Normalize = Callable[[Tensor, torch.dtype], Tensor]


def on_cpu(batch: Tensor, dtype: torch.dtype, in_place: bool = False, mask: Tensor | None = None) -> Tensor:
    return normalize(batch, dtype, in_place=in_place, mask=mask)


def without_check(batch: Tensor, dtype: torch.dtype, in_place: bool = False, mask: Tensor | None = None) -> Tensor:
    """Compute as CUDA does, which cannot look at a norm."""
    if batch.dtype == torch.float64:
        return module._normalize_by_powers_of_two(batch, in_place, None, mask).to(dtype)
    return module._normalize_by_float64_norms(batch, dtype, in_place, None, mask)


def without_float64(batch: Tensor, dtype: torch.dtype, in_place: bool = False, mask: Tensor | None = None) -> Tensor:
    """Compute as MPS does."""
    return module._normalize_by_powers_of_two(batch, in_place, None, mask).to(dtype)


WAYS = [on_cpu, without_check, without_float64]
# Factors of Gaussian entries, from those that leave denormal numbers to those just below the overflow.
SIZES = {
    torch.float64: [1e-320, 1e-308, 1e-300, 1e-170, 1e-162, 1e-100, 1.0, 1e100, 1e154, 1e300, 2e307],
    torch.float32: [1e-43, 1e-40, 1e-38, 1e-30, 1e-19, 1.0, 1e10, 1e19, 1e30, 5e37],
    torch.bfloat16: [1e-38, 1e-30, 1.0, 1e30, 5e37],
    torch.float16: [1e-6, 1e-4, 1.0, 1e4],
}
CASES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]


def reference(batch: Tensor) -> Tensor:
    """Divide by the largest entry and by the norm, in float64."""
    wide = batch.double()
    wide = wide / wide.abs().amax(dim=(-2, -1), keepdim=True)
    return wide / torch.linalg.matrix_norm(wide, keepdim=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "size"), CASES)
@pytest.mark.parametrize("tall", [False, True])
def test_the_norm_is_one_for_entries_of_any_size(way: Normalize, dtype: torch.dtype, size: float, tall: bool) -> None:
    batch = (torch.randn(3, 20, 30, dtype=torch.float64).clamp(-3, 3) * size).to(dtype)
    assert batch.isfinite().all()
    assert batch.any(-1).any(-1).all()
    batch = batch.mT if tall else batch
    wide = torch.promote_types(dtype, torch.float32)
    normalized = way(batch, wide)
    torch.testing.assert_close(normalized.double(), reference(batch), rtol=4 * torch.finfo(wide).eps, atol=1e-30)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", SIZES)
def test_one_entry_of_the_smallest_or_the_largest_number_is_enough(way: Normalize, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    batch = torch.zeros(3, 4, 5, dtype=dtype)
    batch[0, 1, 2], batch[1, 1, 2] = info.smallest_normal * info.eps, -info.max
    batch[2] = info.max  # its norm is above the largest number
    wide = torch.promote_types(dtype, torch.float32)
    expected = torch.zeros(3, 4, 5, dtype=wide)
    expected[0, 1, 2], expected[1, 1, 2], expected[2] = 1, -1, 20**-0.5
    torch.testing.assert_close(way(batch, wide), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", SIZES)
def test_zero_stays_zero_and_what_is_not_finite_becomes_nan(way: Normalize, dtype: torch.dtype) -> None:
    batch = torch.randn(5, 6, 7).to(dtype)
    batch[1] = 0
    batch[2, 3, 3], batch[3, 0, 1], batch[3, 5, 5] = torch.nan, torch.inf, -torch.inf
    wide = torch.promote_types(dtype, torch.float32)
    normalized = way(batch, wide)
    assert normalized[1].count_nonzero() == 0
    assert normalized[2:4].isnan().all()
    others = [0, 4]
    torch.testing.assert_close(normalized[others].double(), reference(batch[others]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tall", [False, True])
def test_a_power_of_two_changes_no_digit_and_neither_do_neighbours(
    way: Normalize, dtype: torch.dtype, tall: bool
) -> None:
    largest = torch.finfo(dtype).max
    matrix = torch.randn(130, 170, dtype=dtype).clamp(-3, 3)
    alone = way(matrix[None], dtype)[0]
    bound = 1020 if dtype == torch.float64 else 120
    powers = [2.0**exponent for exponent in (-bound + 30, -bound // 2, 0, bound // 2, bound)]
    batch = torch.stack([matrix * power for power in powers] + [torch.zeros_like(matrix), matrix.sign() * largest])
    if tall:
        alone, batch = way(matrix[None].mT, dtype)[0], batch.mT
    for normalized in way(batch, dtype)[: len(powers)]:
        assert torch.equal(normalized, alone)


@pytest.mark.parametrize("way", [on_cpu, without_float64])
@pytest.mark.parametrize("shape", [(1024, 2048), (2048, 1024)])
def test_the_sum_of_many_squares_loses_no_digits(way: Normalize, shape: tuple[int, int]) -> None:
    batch = torch.randn(2, *shape)
    for matrices in (batch, batch.mT, 1e-30 * batch, batch.bfloat16()):
        norms = torch.linalg.matrix_norm(way(matrices, torch.float32).double())
        torch.testing.assert_close(norms, torch.ones(2, dtype=torch.float64), atol=5e-7, rtol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_in_place_it_gives_the_same_in_the_memory_of_the_input(way: Callable[..., Tensor], size: float) -> None:
    batch = size * torch.randn(2, 5, 6)
    before = batch.clone()
    expected = way(batch, torch.float32)
    assert torch.equal(batch, before)
    assert torch.equal(way(batch, torch.float32, in_place=True), expected)


class Elements(TorchDispatchMode):
    """Count the elements that operations write, and the dtypes in which they do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written = 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **kwargs or {})
        is_view = func.is_view or func.overloadpacket.__name__ in {"empty_like", "_unsafe_view"}
        if isinstance(result, Tensor) and result.numel() > 1000 and not is_view:
            self.written += result.numel()
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_the_batch_is_read_twice_and_written_once(dtype: torch.dtype) -> None:
    """The norm reads it; the product reads it again and writes the working precision, without a copy in between."""
    with FakeTensorMode(), Elements() as elements:
        batch = torch.empty(2, 64, 128, device="cuda", dtype=dtype)
        elements.written, elements.dtypes = 0, set()
        normalize(batch, torch.bfloat16)
    assert elements.written == batch.numel()
    assert elements.dtypes == {torch.bfloat16}


def test_half_precision_is_scaled_before_it_is_rounded() -> None:
    """Entries of float16 at both ends of its range, computed in float16."""
    matrix = torch.randn(12, 20)
    exact = orthogonalize(matrix, "svd")
    for size in (1e-7, 6e4 / matrix.abs().max()):
        scaled = (matrix * size).half()
        factor = orthogonalize(scaled, "newton_schulz", dtype="float16", coefficients="cubic", steps=25)
        expected = exact if size > 1 else orthogonalize(scaled.float(), "svd")
        torch.testing.assert_close(factor.float(), expected, atol=2e-2, rtol=0)


def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("size", [1e-40, 1.0, 1e38])
def test_inside_of_torch_compile_it_is_the_same(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = size * torch.randn(2, 5, 6).clamp(-3, 3)
    expected = reference(batch)
    as_compiled(monkeypatch)
    torch.testing.assert_close(normalize(batch, torch.float32).double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-25, 1.0])
def test_an_error_leaves_the_matrix_unchanged(bad: float, dtype: torch.dtype, size: float) -> None:
    batch = (size * torch.randn(4, 6, 5)).to(dtype)
    batch[2, 1, 1] = bad
    before = batch.clone()
    for way in (partial(orthogonalize, batch, out=batch), partial(orthogonalize, batch.mT, out=batch.mT)):
        with pytest.raises(ValueError, match=r"NaN or infinite entries in matrices \(2,\)"):
            way()
    assert torch.equal(batch.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("newton_schulz", {"steps": 0}),
        ("newton_schulz", {"coefficients": [[1.5, -0.5, 0.0]] * 6}),
        ("gram_newton_schulz", {"restart_every": 0}),
        ("polar_express", {"lower_bound": 2.0}),
        ("qdwh", {"lower_bound": 0.0}),
    ],
)
def test_so_does_a_bad_option(method: Any, options: dict[str, Any]) -> None:
    matrix = torch.randn(4, 6)
    before = matrix.clone()
    with pytest.raises(ValueError, match=next(iter(options))):
        orthogonalize(matrix, method, out=matrix, **options)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_masked_matrices_become_zero_but_broken_ones_nan(way: Any, dtype: torch.dtype, in_place: bool) -> None:
    batch = torch.randn(6, 5, 7, dtype=torch.float64).to(dtype)
    batch[1] *= 1e-30  # whose norm a CPU computes in another way
    batch[2] *= 1e30
    batch[3] = 0
    batch[4, 0, 0] = torch.nan
    expected = way(batch, dtype)
    expected[[0, 1, 2]] = 0
    mask = torch.tensor([False, False, False, False, False, True])
    found = way(batch.clone(), dtype, in_place, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found[4].isnan().all()
