"""The extreme singular values, against float64."""

import pytest
import torch
from torch import Tensor

from lightning_muon.callbacks.measures.polar_factors import FactorMeter, gram_matrices, orthogonality_error
from lightning_muon.callbacks.measures.singular_values import extreme_singular_values, lanczos
from lightning_muon.optim import orthogonalize


def with_singular_values(values: Tensor, columns: int) -> Tensor:
    """A matrix (1, values, columns) of these singular values, float64."""
    rank = len(values)
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q for size in (rank, columns))
    return ((left * values.double()) @ right.mT).unsqueeze(0)


def found(matrices: Tensor) -> Tensor:
    return extreme_singular_values(lanczos(gram_matrices(matrices.float())))


def expected(matrices: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrices.double())[:, [-1, 0]]


BAND = torch.linspace(0.7, 1.1, 124)


@pytest.mark.parametrize(
    ("values", "smallest", "largest"),
    [
        # Of up to 32 all that float32 has: the square of a small one is rounded by 1e-7.
        (torch.tensor([0.3]), 1e-6, 1e-6),
        (torch.tensor([0.01, 0.3, 1.0]), 1e-4, 1e-6),
        (torch.linspace(0.7, 1.1, 20), 1e-6, 1e-6),
        (torch.linspace(0.01, 1.1, 32), 1e-4, 1e-6),
        (torch.logspace(0, -6, 20), 5e-4, 1e-6),  # ill-conditioned
        (torch.cat([torch.zeros(7), torch.linspace(0.1, 1.1, 20)]), 5e-4, 1e-6),  # rank-deficient
        # Of more, those that stand apart.
        (torch.cat([torch.tensor([0.02]), BAND, torch.tensor([1.4])]), 1e-4, 1e-5),
        (torch.cat([torch.zeros(3), torch.ones(60)]), 5e-4, 1e-5),
        (torch.cat([torch.zeros(195), torch.linspace(0.7, 1.1, 5)]), 5e-4, 1e-5),
        (torch.cat([torch.zeros(127), torch.ones(1)]), 5e-4, 1e-5),
        (torch.cat([torch.full((60,), 0.7), torch.full((60,), 1.13)]), 1e-5, 1e-5),
        # The space is exhausted, up to rounding, by the first direction.
        (torch.ones(200), 1e-5, 1e-5),
        (torch.linspace(1 - 1e-4, 1 + 1e-4, 128), 1e-5, 1e-5),
        # The ends of dense bands.
        (torch.linspace(0.7, 1.1, 200), 1e-2, 5e-3),
        (torch.linspace(0.01, 1.1, 128), 7e-2, 1e-2),
        (torch.logspace(0, -6, 128), 2e-2, 1e-5),
    ],
)
def test_extreme_singular_values(values: Tensor, smallest: float, largest: float) -> None:
    torch.manual_seed(0)
    matrix = with_singular_values(values, len(values) + 20)
    (low, high), (least, most) = found(matrix)[0].tolist(), expected(matrix)[0].tolist()
    assert low == pytest.approx(least, abs=smallest)
    assert high == pytest.approx(most, abs=largest)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (128, 512), (384, 384)])
@pytest.mark.parametrize("spectrum", ["full", "decaying", "deficient"])
def test_what_newton_schulz_makes(shape: tuple[int, int], spectrum: str) -> None:
    """As near as is said, and always from inside."""
    torch.manual_seed(1)
    rank, columns = shape
    values = {
        "full": torch.ones(rank),
        "decaying": torch.logspace(0, -5, rank),
        "deficient": torch.cat([torch.logspace(0, -2, rank // 4), torch.zeros(rank - rank // 4)]),
    }[spectrum]
    gradient = torch.randn(1, *shape) if spectrum == "full" else with_singular_values(values, columns).float()
    factor = orthogonalize(gradient, "newton_schulz")
    (low, high), (least, most) = found(factor)[0].tolist(), expected(factor)[0].tolist()
    assert -5e-4 <= low - least <= 0.07
    assert -0.03 <= high - most <= 1e-5


def test_a_broken_matrix_spoils_no_other() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(4, 6, 9)
    matrices[1, 2, 3], matrices[2, 0, 0] = torch.nan, torch.inf
    values = found(matrices)
    assert values[1:3].isnan().all()
    torch.testing.assert_close(values[[0, 3]], expected(matrices[[0, 3]]), rtol=1e-5, atol=1e-5)


def test_nothing_is_zero() -> None:
    assert found(torch.zeros(2, 40, 50)).tolist() == [[0.0, 0.0]] * 2


def test_autocast_rounds_nothing() -> None:
    """Under manual optimization a step runs inside autocast."""
    torch.manual_seed(0)
    factor = torch.randn(1, 20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found(factor), expected(factor), rtol=1e-5, atol=1e-5)


def test_small_and_large_ones_come_out_in_their_places() -> None:
    """In batches of several shapes, some of which wait for others and one of which is large enough by itself."""
    torch.manual_seed(0)
    shapes = [(2, 5, 9), (1, 9, 5), (3, 7, 7), (5, 500, 520), (2, 40, 5)]
    batches = [torch.randn(shape) / max(shape) ** 0.5 for shape in shapes]
    meter = FactorMeter()
    for place, batch in enumerate(batches):
        meter.add([(str(place), index) for index in range(len(batch))], batch)
        batch_copy = batch.clone()
        batch.zero_()  # the optimizer goes on to use the memory
        batches[place] = batch_copy
    measured = meter.finish()
    assert not meter.finish()
    assert len(measured) == 3  # of the smaller sides 5, 7 and 500
    places = [place for one in measured for place in one.places]
    assert sorted(places) == sorted((str(place), i) for place, batch in enumerate(batches) for i in range(len(batch)))
    for one in measured:
        for (name, index), error, extremes in zip(
            one.places, one.errors, extreme_singular_values(one.tridiagonals), strict=True
        ):
            squares = torch.linalg.svdvals(batches[int(name)][index or 0].double()).square()
            assert float(error) == pytest.approx(float((squares - 1).square().mean().sqrt()), rel=1e-5)
            assert float(extremes[1]) == pytest.approx(float(squares[0].sqrt()), abs=1e-2)


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (2, 1, 7), (1, 4, 4)])
def test_error_of_a_batch(shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape)
    squares = torch.linalg.svdvals(batch.double()).square()
    deviation = (squares - 1).square().mean(-1).sqrt().float()
    torch.testing.assert_close(orthogonality_error(gram_matrices(batch)), deviation, rtol=1e-4, atol=1e-5)
