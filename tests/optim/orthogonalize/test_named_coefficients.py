"""The published coefficient sets land in their bands, and are used for as many steps as asked."""

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.quintics import Quintic, quintics

# Name, steps, the singular value above which the band holds, and the exact ends of the band to three digits.
BANDS = [
    ("keller_jordan", 5, 0.01, 0.682, 1.134),
    ("modded_nanogpt", 5, 0.01, 0.978, 1.032),
    ("modded_nanogpt", 5, 0.002, 0.853, 1.145),
    ("modula", 6, 0.002, 0.9956, 0.9993),
    ("deepseek_v4", 10, 0.001, 1.0, 1.0005),
    ("polar_express", 5, 0.001, 0.852, 1.124),
]


def composition(schedule: tuple[Quintic, ...], x: Tensor) -> Tensor:
    for a, b, c in schedule:
        x = x * (a + x * x * (b + x * x * c))
    return x


@pytest.mark.parametrize(("name", "steps", "smallest", "low", "high"), BANDS)
def test_singular_values_end_in_the_band(name: str, steps: int, smallest: float, low: float, high: float) -> None:
    x = torch.logspace(math.log10(smallest), 0, 200_001, dtype=torch.float64)
    y = composition(quintics(name, steps), x)
    tolerance = 0.6 * 10.0 ** -len(str(high).partition(".")[2])
    assert y.min().item() == pytest.approx(low, abs=tolerance)
    assert y.max().item() == pytest.approx(high, abs=tolerance)


@pytest.mark.parametrize(("name", "steps"), [("modded_nanogpt", 5), ("modula", 6), ("deepseek_v4", 10)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(40, 40), (32, 128)])
def test_in_every_precision_they_stay_there(name: str, steps: int, dtype: str, shape: tuple[int, int]) -> None:
    """Also where rounding takes a singular value beyond one: that of a matrix of rank one."""
    full, single = torch.randn(shape), torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    factor = orthogonalize(torch.stack([full, single]), steps=steps, coefficients=name, dtype=dtype)
    largest = torch.linalg.matrix_norm(factor, 2)
    assert largest.max() < 1.17
    assert largest.min() > 0.95


def test_a_schedule_begins_at_its_first_triple_and_repeats_its_last() -> None:
    whole = quintics("modula", 6)
    assert len(set(whole)) == 6
    assert quintics("modula", 4) == whole[:4]
    assert quintics("modula", 8) == (*whole, whole[-1], whole[-1])
    assert quintics("deepseek_v4", 10) == (*quintics("keller_jordan", 8), (2.0, -1.5, 0.5), (2.0, -1.5, 0.5))


@pytest.mark.parametrize("triple", [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)])
def test_the_steps_that_converge_do_so_quadratically(triple: Quintic) -> None:
    """Each step squares the distance from one, up to a factor."""
    distances = [float(abs(composition((triple,), torch.tensor(1 + e, dtype=torch.float64)) - 1)) for e in (1e-2, 1e-3)]
    assert distances[1] < distances[0] / 90


def test_the_steps_of_modula_never_exceed_one() -> None:
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    last = list(accumulate(quintics("modula", 6), lambda y, triple: composition((triple,), y), initial=x))[-1]
    assert last.max() < 1
    assert last.min() == 0


@pytest.mark.parametrize("steps", [5, 6, 15])
@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(64, 128), (64, 64), (100, 300)])
def test_the_cubic_is_right_in_runs_of_two_steps(method: str, dtype: str, steps: int, shape: tuple[int, int]) -> None:
    """``baddbmm`` with alpha=0 ignores beta on CPUs that multiply in bfloat16."""
    matrix = torch.randn(shape)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = u * composition(quintics("cubic", steps), s / s.norm()) @ vh
    factor = orthogonalize(matrix, method, coefficients="cubic", steps=steps, dtype=dtype)
    tolerance = {"bfloat16": 0.06, "float16": 0.01, "float32": 1e-4, "float64": 1e-6}[dtype]
    assert torch.linalg.matrix_norm(factor - expected, 2) < tolerance


@pytest.mark.parametrize("triple", [(1.5, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.0, 0.5)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_coefficients_may_be_zero(triple: Quintic, dtype: str) -> None:
    matrix = torch.randn(64, 128)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = u * composition((triple,) * 2, s / s.norm()) @ vh
    factor = orthogonalize(matrix, coefficients=triple, steps=2, dtype=dtype).double()
    assert torch.linalg.matrix_norm(factor - expected) < (0.05 if dtype == "bfloat16" else 1e-5) * max(
        1e-3, float(torch.linalg.matrix_norm(expected))
    )
