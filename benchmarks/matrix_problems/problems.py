"""The problems: the function to minimize, its gradient, and the loss to report.

Sizes, distributions and numbers of steps are those of Lau, Long & Su, "PolarGrad" (2025), arXiv:2505.21799, section 6,
and of its code, https://github.com/timlautk/polargrad. Explicit gradients are cheaper than autograd.
"""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus


class Problem(Protocol):
    """A function of one or two matrices."""

    title: str
    loss_label: str
    steps: int
    # Factor of the learning rate every 25 steps, in runs with decay.
    decay: float

    def start(self) -> list[Tensor]:
        """Return the initial matrices, the same for every method."""

    def gradients(self, matrices: list[Tensor], step: int) -> list[Tensor]:
        """Return the gradient of each matrix. ``step`` selects the batch if gradients are stochastic."""

    def loss(self, matrices: list[Tensor]) -> float:
        """Return the loss to plot and compare."""


class QuadraticRegression:
    """½‖AXB − C‖² for Gaussian A, B and C, in float64: strongly convex, with exact gradients.

    With the minimum X*, the gradient is AᵀA(X − X*)BBᵀ. The distance of the loss from its minimum is half the inner
    product of this gradient with X − X*, which avoids cancellation near the minimum.
    """

    title = "Quadratic regression, X 500×100"
    loss_label = "(f − f*) / (f₀ − f*)"
    steps = 4000
    decay = 0.99

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        # In float32 and in this order, a seed gives the A, B and C of the paper's code.
        a = torch.randn(1000, 500, generator=generator).double()
        b = torch.randn(100, 250, generator=generator).double()
        c = torch.randn(1000, 250, generator=generator).double()
        self._start = torch.empty(500, 100).uniform_(-1, 1, generator=generator).double()
        self._left, self._right = a.mT @ a, b @ b.mT
        self._minimum = torch.linalg.solve(self._left, a.mT @ c @ b.mT) @ torch.linalg.inv(self._right)

    def start(self) -> list[Tensor]:
        """Return a matrix with uniform entries."""
        return [self._start]

    def gradients(self, matrices: list[Tensor], step: int) -> list[Tensor]:
        """Return the exact gradient."""
        return [self._left @ (matrices[0] - self._minimum) @ self._right]

    def loss(self, matrices: list[Tensor]) -> float:
        """Return the distance from the minimal loss, relative to the initial distance."""
        return self._distance(matrices[0]) / self._initial_distance

    @cached_property
    def _initial_distance(self) -> float:
        return self._distance(self._start)

    def _distance(self, matrix: Tensor) -> float:
        return 0.5 * float(torch.sum(self.gradients([matrix], 0)[0] * (matrix - self._minimum)))


class LogisticRegression:
    """Σ softplus(−C ∘ AXB) with labels C = ±1, in float32: convex, with gradients from 1000 of the 10000 rows."""

    title = "Logistic regression, X 1000×100, batches of 1000"
    loss_label = "loss of all data, per entry"
    steps = 1500
    decay = 0.95

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._a = torch.randn(10000, 1000, generator=generator)
        self._b = torch.randn(100, 400, generator=generator)
        self._labels = torch.where(torch.randn(10000, 400, generator=generator) > 0.5, 1.0, -1.0)
        self._start = torch.empty(1000, 100).uniform_(-1, 1, generator=generator)

    def start(self) -> list[Tensor]:
        """Return a matrix with uniform entries."""
        return [self._start]

    def gradients(self, matrices: list[Tensor], step: int) -> list[Tensor]:
        """Return the gradient of the sum over a batch, drawn with replacement. All methods use the same batches."""
        generator = torch.Generator().manual_seed(self._seed + 1 + step)
        rows = torch.randint(10000, (1000,), generator=generator)
        a, labels = self._a[rows], self._labels[rows]
        slopes = torch.sigmoid(-labels * (a @ matrices[0] @ self._b)).mul_(labels)
        return [-(a.mT @ (slopes @ self._b.mT))]

    def loss(self, matrices: list[Tensor]) -> float:
        """Return the mean over all entries, not over a batch."""
        return float(softplus(-self._labels * (self._a @ (matrices[0] @ self._b))).mean())


class LowRankCompletion:
    """The mean of (XYᵀ − M)² over the 30 % observed entries of a matrix M of rank 5, in float64: not convex."""

    title = "Low-rank completion, 500×250, rank 5, 30 % observed"
    loss_label = "mean squared error, observed entries"
    steps = 1000
    decay = 0.95

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def gaussian(rows: int) -> Tensor:
            return torch.randn(rows, 5, generator=generator, dtype=torch.float64)

        def uniform(rows: int) -> Tensor:
            return torch.empty(rows, 5, dtype=torch.float64).uniform_(-1, 1, generator=generator)

        self._target = gaussian(500) @ gaussian(250).mT
        self._observed = (torch.rand(500, 250, generator=generator) < 0.3).double()
        self._start = [uniform(500), uniform(250)]

    def start(self) -> list[Tensor]:
        """Return both factors, with uniform entries."""
        return self._start

    def gradients(self, matrices: list[Tensor], step: int) -> list[Tensor]:
        """Return the exact gradients of X and Y."""
        x, y = matrices
        residual = self._residual(matrices) * (2 / self._observed.sum())
        return [residual @ y, residual.mT @ x]

    def loss(self, matrices: list[Tensor]) -> float:
        """Return the squared error, divided by the number of observed entries."""
        return float(self._residual(matrices).square().sum() / self._observed.sum())

    def _residual(self, matrices: list[Tensor]) -> Tensor:
        x, y = matrices
        return self._observed * (x @ y.mT - self._target)


PROBLEMS: dict[str, type[QuadraticRegression | LogisticRegression | LowRankCompletion]] = {
    "quadratic": QuadraticRegression,
    "logistic": LogisticRegression,
    "completion": LowRankCompletion,
}
