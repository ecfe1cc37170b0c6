"""``orthogonalize``: all shapes, scales and mixtures of matrices, and an error for each bad input."""

import re
import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.exact import qdwh, zolo_pd
from lightning_muon.optim.polar.newton_schulz import gram_newton_schulz, newton_schulz, polar_express
from lightning_muon.optim.polar.orthogonalize import Orthogonalizer, OrthogonalizerName

METHODS = get_args(OrthogonalizerName)
METHOD_FUNCTIONS: dict[Orthogonalizer, Callable[..., Tensor]] = {
    "newton_schulz": newton_schulz,
    "gram_newton_schulz": gram_newton_schulz,
    "polar_express": polar_express,
    "qdwh": qdwh,
    "zolo_pd": zolo_pd,
}
# How far the singular values of the factor may be from one, for a matrix whose own are not small.
BANDS = {
    "newton_schulz": 0.35,
    "polar_express": 0.16,
    "gram_newton_schulz": 0.35,
    "qdwh": 1e-5,
    "zolo_pd": 1e-5,
    "svd": 1e-5,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_the_size_of_the_entries_does_not_matter(method: Orthogonalizer, size: float) -> None:
    matrix = torch.randn(12, 20)
    torch.testing.assert_close(orthogonalize(matrix * size, method), orthogonalize(matrix, method), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_zero_gives_zero_and_low_rank_stays_finite(method: Orthogonalizer) -> None:
    batch = torch.zeros(3, 8, 16)
    batch[1] = torch.outer(torch.randn(8), torch.randn(16))
    batch[2] = torch.randn(8, 16)
    factor = orthogonalize(batch, method)
    assert factor[0].count_nonzero() == 0
    assert factor.isfinite().all()
    assert abs(torch.linalg.matrix_norm(factor[1], 2) - 1) < BANDS[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(30, 30), (24, 40), (40, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rows_and_columns_stay_zero(method: Orthogonalizer, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """As those of units that have died or of tokens that did not occur: they must get no update."""
    matrix = torch.randn(shape, dtype=dtype)
    matrix[3:5] = 0
    matrix[:, [2, -1]] = 0
    factor = orthogonalize(matrix, method)
    assert factor[3:5].abs().max() < 1e-2
    assert factor[:, [2, -1]].abs().max() < 1e-2
    assert torch.linalg.matrix_norm(factor, 2) < 1.21


def difficult_batch() -> Tensor:
    """Matrices of 12×20: full rank with entries of any size, zero, rank one, rank five, condition 1e12."""
    u, v = torch.linalg.qr(torch.randn(12, 12)).Q, torch.linalg.qr(torch.randn(20, 12)).Q
    full = u * torch.linspace(0.2, 1, 12) @ v.mT
    ill_conditioned = u * torch.logspace(0, -12, 12) @ v.mT
    low_rank = torch.randn(12, 5) @ torch.randn(5, 20)
    rank_one = torch.outer(torch.randn(12), torch.randn(20))
    return torch.stack([full, full * 1e-20, full * 1e20, torch.zeros(12, 20), rank_one, low_rank, ill_conditioned])


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_difficult_matrices_do_not_disturb_each_other(method: Orthogonalizer, tall: bool) -> None:
    batch = difficult_batch().mT if tall else difficult_batch()
    factor = orthogonalize(batch, method)
    singular_values = torch.linalg.svdvals(factor)
    full, zero, rank_one = singular_values[:3], singular_values[3], singular_values[4]
    assert (full - 1).abs().max() < BANDS[method]
    assert zero.count_nonzero() == 0
    assert abs(rank_one[0] - 1) < BANDS[method]
    assert (singular_values[5:, :2] - 1).abs().max() < BANDS[method]
    assert singular_values.max() < 1.21
    alone = torch.stack([orthogonalize(matrix, method) for matrix in batch])
    # Where nothing but rounding is left, even the order of sums decides.
    torch.testing.assert_close(factor[:4], alone[:4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1)])
def test_the_factor_of_a_vector_is_its_direction(method: Orthogonalizer, shape: tuple[int, int]) -> None:
    vector = torch.randn(shape)
    factor = orthogonalize(vector, method)
    torch.testing.assert_close(factor / factor.norm(), vector / vector.norm(), atol=1e-6, rtol=0)
    assert abs(factor.norm() - 1) < BANDS[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_is_named(method: Orthogonalizer, bad: float) -> None:
    batch = torch.randn(2, 3, 8, 6)
    batch[0, 2, 5, 1] = bad
    batch[1, 1, 0, 0] = bad
    with pytest.raises(ValueError, match=r"NaN or infinite entries in matrices \(0, 2\), \(1, 1\) of the batch"):
        orthogonalize(batch, method)
    with pytest.raises(ValueError, match=r"in the matrix of shape \(8, 6\)"):
        orthogonalize(batch[1, 1], method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (7, 7)])
def test_unchecked_it_becomes_nan_and_the_others_do_not(
    method: Orthogonalizer, bad: float, shape: tuple[int, int]
) -> None:
    batch = torch.randn(4, *shape)
    expected = orthogonalize(batch, method)
    batch[1, 5, 1] = bad
    factor = orthogonalize(batch, method, check_finite=False)
    assert factor[1].isnan().all()
    others = [0, 2, 3]
    torch.testing.assert_close(factor[others], expected[others], atol=1e-5, rtol=0)


class Operations(TorchDispatchMode):
    """Records what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.products: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs or {})
        self.names.add(name)
        if name in {"bmm", "baddbmm"}:
            self.products.add(result.dtype)
        return result


@pytest.mark.parametrize("method", METHODS)
def test_unchecked_nothing_waits_for_the_device(method: Orthogonalizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is read, and no constant is sent: a copy from the host's own memory would wait too."""
    waiting = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh", "item"}
    batch = torch.randn(3, 16, 64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # or it would look, as a CPU may
    with Operations() as unchecked:
        orthogonalize(batch, method, check_finite=False)
    assert not unchecked.names & waiting
    with Operations() as checked:
        orthogonalize(batch, method)
    assert checked.names & waiting


@pytest.mark.parametrize("shape", [(5, 6, 10), (2, 3, 10, 6), (1, 1, 4, 4), (6, 8, 6)])
def test_a_batch_is_each_matrix_by_itself(shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    flat = batch.reshape(-1, *shape[-2:])
    expected = torch.stack([orthogonalize(matrix) for matrix in flat]).reshape(shape)
    torch.testing.assert_close(orthogonalize(batch), expected, atol=1e-5, rtol=1e-5)


def test_the_input_is_left_alone() -> None:
    matrix = torch.randn(6, 6)
    before = matrix.clone()
    orthogonalize(matrix)
    assert torch.equal(matrix, before)


def test_the_precision_can_be_chosen() -> None:
    matrix = torch.randn(10, 30)
    coarse = orthogonalize(matrix, dtype=torch.bfloat16)
    assert coarse.dtype == torch.float32
    assert 1e-4 < (coarse - orthogonalize(matrix)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("newton_schulz", torch.bfloat16),
        ("polar_express", torch.bfloat16),
        ("gram_newton_schulz", torch.float16),
    ],
)
def test_on_cuda_the_products_run_in_half_precision(method: Orthogonalizer, dtype: torch.dtype) -> None:
    with FakeTensorMode(), Operations() as operations:  # there are shapes and types, and no GPU
        factor = orthogonalize(torch.empty(2, 8, 32, device="cuda"), method, check_finite=False)
    assert operations.products == {dtype}
    assert factor.dtype == torch.float32


@pytest.mark.parametrize(("fast", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("method", ["newton_schulz", "polar_express", "gram_newton_schulz"])
def test_on_a_cpu_its_instructions_decide(
    method: Orthogonalizer, fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[orthogonalize.__module__], "_cpu_multiplies_bfloat16", lambda: fast)
    with Operations() as operations:
        factor = orthogonalize(torch.randn(2, 8, 32), method)
    assert operations.products == {dtype}
    assert factor.dtype == torch.float32


@pytest.mark.parametrize("method", get_args(OrthogonalizerName))
@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 7)])
def test_the_factor_goes_where_it_is_wanted(method: Orthogonalizer, shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape)
    expected = orthogonalize(matrix, method)
    elsewhere = torch.empty(shape)
    assert orthogonalize(matrix, method, out=elsewhere) is elsewhere
    assert orthogonalize(matrix, method, out=matrix) is matrix
    torch.testing.assert_close(elsewhere, expected, atol=0, rtol=0)
    torch.testing.assert_close(matrix, expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"out must be like the matrix, .* got \(3,\) of torch.float32 on cpu"):
        orthogonalize(matrix, method, out=torch.empty(3))


@pytest.mark.parametrize("norm", [1e-36, 1e-20, 1e20, 1e36])
def test_entries_at_the_ends_of_the_range_lose_no_digits(norm: float) -> None:
    matrix = torch.randn(4, 8)
    matrix /= torch.linalg.matrix_norm(matrix)
    torch.testing.assert_close(orthogonalize(norm * matrix), orthogonalize(matrix), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), "newton_schulz"), r"shape \(\.\.\., m, n\), got \(3,\)"),
        ((torch.zeros(3, 3, dtype=torch.int64), "newton_schulz"), "matrix must be a tensor of float64, .*int64"),
        ((torch.zeros(3, 3, dtype=torch.complex64), "newton_schulz"), "matrix must be a tensor of .*complex64"),
        ((torch.zeros(3, 3, dtype=torch.float8_e4m3fn), "newton_schulz"), "matrix must be a tensor of .*float8_e4m3fn"),
        ((torch.zeros(3, 3, dtype=torch.float8_e5m2), "svd"), "matrix must be a tensor of .*float8_e5m2"),
        (([[1.0, 2.0], [3.0, 4.0]], "newton_schulz"), "matrix must be a tensor of .* got list"),
        ((torch.zeros(3, 3), "newton"), "unknown orthogonalizer 'newton'; choose one of newton_schulz, polar_express"),
    ],
)
def test_bad_input_is_refused(arguments: tuple[Tensor, Orthogonalizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(*arguments)


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        (method, option, value, message)
        for option, methods, cases in (
            (
                "steps",
                ("newton_schulz", "gram_newton_schulz", "polar_express"),
                [
                    *(
                        (value, f"steps must be a whole number, got {value!r}")
                        for value in (2.5, 5.0, "5", True, None, [5])
                    ),
                    (0, "steps must be at least 1, got 0"),
                    (-3, "steps must be at least 1, got -3"),
                ],
            ),
            (
                "restart_every",
                ("gram_newton_schulz", "polar_express"),
                [
                    *(
                        (value, f"restart_every must be a whole number, got {value!r}")
                        for value in (1.5, "2", True, None)
                    ),
                    (0, "restart_every must be at least 1, got 0"),
                ],
            ),
            (
                "coefficients",
                ("newton_schulz", "gram_newton_schulz"),
                [
                    (None, "coefficients must be a name, three numbers, or a list of triples, got None"),
                    (1.5, "coefficients must be a name, three numbers, or a list of triples, got 1.5"),
                    *(
                        (value, "coefficients must be three numbers a, b, c, or a list of such triples, got")
                        for value in (
                            [float("nan"), 0.0, 0.0],
                            (1.5, float("inf"), 0.0),
                            [[1.5, -0.5, 0.0], [1.5, -0.5, float("nan")]],
                            ["1.5", "-0.5", "0"],
                            [["a", "b", "c"]],
                            ["cubic"],
                            [True, False, True],
                            [1.5, -0.5],
                            [],
                            [[]],
                            [None],
                        )
                    ),
                ],
            ),
            (
                "lower_bound",
                ("polar_express", "qdwh", "zolo_pd"),
                [
                    (value, f"lower_bound must lie between 1e-30 and 1, got {value!r}")
                    for value in (0.0, 1.0, -1e-3, 1e-40, float("nan"), float("inf"), "0.1", True, [0.1])
                ],
            ),
            ("lower_bound", ("polar_express",), [(None, "lower_bound must lie between 1e-30 and 1, got None")]),
        )
        for method in methods
        for value, message in cases
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_the_option(
    method: Orthogonalizer, option: str, value: object, message: str
) -> None:
    matrix = torch.randn(3, 30)
    before = matrix.clone()
    for call in (
        lambda: orthogonalize(matrix, method, out=matrix, **{option: value}),  # type: ignore[arg-type]
        lambda: METHOD_FUNCTIONS[method](matrix[None], **{option: value}),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert torch.equal(matrix, before)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no option 'step'; it takes dtype, steps, coefficients"):
        orthogonalize(torch.zeros(3, 3), step=5)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(
        ValueError, match="does not run in dtype 'bf16'; choose one of float64, float32, bfloat16, float16"
    ):
        orthogonalize(torch.zeros(3, 3), dtype="bf16")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_masked_matrices_give_zero_and_the_others_what_they_give_without(method: Any, in_place: bool) -> None:
    matrices = torch.randn(2, 3, 5, 4)
    expected = orthogonalize(matrices, method)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    expected[~mask] = 0
    assert torch.equal(orthogonalize(matrices, method, mask=mask, out=matrices if in_place else None), expected)
    for wrong in (mask.float(), mask[0]):
        with pytest.raises(ValueError, match="mask must be boolean"):
            orthogonalize(matrices, method, mask=wrong)
