"""NorMuon: the same size of update for all neurons of a layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muon.optim.update.matrix_layout import MatrixLayout

# Keeps a neuron that never had an update from being divided by zero; the ε of arXiv:2510.05491, algorithm 1.
NEURON_EPS = 1e-8


def neuron_factors(mean_squares: Tensor, squares: Tensor) -> Tensor:
    """Return the number that multiplies the update of each neuron.

    Polar factors have singular values near one, but rows of very different norms. Dividing row i by √vᵢ, where v is the
    moving average of the mean square of row i, makes the rows alike. The Frobenius norm of each matrix stays what it
    was, so that the update scale means the same with and without.

    Source: Li et al., "NorMuon" (2025), arXiv:2510.05491, as in the authors' code,
    https://github.com/zichongli5/NorMuon. Algorithm 1 of the paper differs in the last step: it gives every matrix the
    RMS 0.2, which is ``update_scale="moonlight"`` up to the deviation of the polar factor from orthogonal.

    Args:
        mean_squares: Moving averages of the mean square of each neuron's step, this step included, shape (b, neurons).
        squares: The sum of the squares of each neuron's step, shape (b, neurons), which is also that of the result.
    """
    factors = 1 / (mean_squares.sqrt() + NEURON_EPS)
    size, new_size = (s.sum(dim=-1, keepdim=True).sqrt() for s in (squares, squares * factors**2))
    scaled: Tensor = factors * (size / new_size.clamp_min(torch.finfo(factors.dtype).tiny))
    return scaled


@dataclass(frozen=True)
class Neurons:
    """The neurons of a parameter, whole on this rank: one number each, in the order of its matrices.

    Args:
        layout: Where the matrices are.
        shape: Shape of the parameter.
    """

    layout: MatrixLayout
    shape: Sequence[int]

    @property
    def count(self) -> int:
        """Number of neurons."""
        shapes = zip(self.layout.counts(self.shape), self.layout.fans(self.shape), strict=True)
        return sum(count * fan_out for count, (fan_out, _) in shapes)

    def numbers(self, elements: Tensor) -> Tensor:
        """Return the mean over each neuron of a tensor with the elements of the parameter, shape (neurons,)."""
        wide = elements.reshape(tuple(self.shape)).double()
        means = self._means(wide)
        # Sums of equal numbers round, but what is left of them does not: what ``elements`` has made comes back as it
        # was, in float64 too.
        return (means + self._means(wide - self.elements(means))).to(elements.dtype)

    def _means(self, elements: Tensor) -> Tensor:
        means = [of_shape.mean(inputs_of(self.layout)).flatten() for of_shape in self.layout.matrices(elements)]
        return torch.cat(means)

    def elements(self, numbers: Tensor) -> Tensor:
        """Return for each element of the parameter the number of its neuron."""
        matrices = [
            of_shape.unsqueeze(inputs_of(self.layout)).expand(
                -1, *((fan_in, -1) if self.layout.transposed else (-1, fan_in))
            )
            for of_shape, (_, fan_in) in zip(self.by_shape(numbers), self.layout.fans(self.shape), strict=True)
        ]
        return self.layout.restore(matrices, self.shape)

    def by_shape(self, numbers: Tensor) -> list[Tensor]:
        """Split numbers (neurons,) into those of each shape of matrix, (b, fan-out)."""
        shapes = list(zip(self.layout.counts(self.shape), self.layout.fans(self.shape), strict=True))
        split = numbers.split([count * fan_out for count, (fan_out, _) in shapes])
        return [of_shape.view(-1, fan_out) for of_shape, (_, (fan_out, _)) in zip(split, shapes, strict=True)]


def inputs_of(layout: MatrixLayout) -> int:
    """Return the dimension of a batch of matrices over which a neuron extends."""
    return -2 if layout.transposed else -1


@dataclass(frozen=True)
class NeuronsOfParts:
    """The neurons of parts of a parameter, one part after another, each whole on this rank."""

    parts: Sequence[Neurons]

    @property
    def count(self) -> int:
        """Number of neurons."""
        return sum(part.count for part in self.parts)

    def split(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Split numbers (neurons,) into those of the parts."""
        split: tuple[Tensor, ...] = numbers.split([part.count for part in self.parts])
        return split

    def numbers(self, elements: Tensor) -> Tensor:
        """Return the mean over each neuron of the elements of the parts, shape (neurons,)."""
        split = elements.reshape(-1).split([math.prod(part.shape) for part in self.parts])
        found = [part.numbers(of_part) for part, of_part in zip(self.parts, split, strict=True)]
        return torch.cat(found) if found else elements.new_zeros(0)

    def elements(self, numbers: Tensor) -> Tensor:
        """Return for each element of the parts the number of its neuron, shape (elements,)."""
        split = zip(self.parts, self.split(numbers), strict=True)
        found = [part.elements(of_part).flatten() for part, of_part in split]
        return torch.cat(found) if found else numbers.new_zeros(0)
