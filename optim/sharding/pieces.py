"""Numbers of matrices and neurons, from the pieces of them that a rank has."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_muon.optim.sharding.buckets import Piece
from lightning_muon.optim.sharding.sharding import Unit
from lightning_muon.optim.update.normuon import Neurons, inputs_of


def neurons_of(unit: Unit) -> Neurons:
    """Return the neurons of all matrices in a unit."""
    return Neurons(unit.layout, unit.shape)


def matrix_sums(elements: Tensor, piece: Piece) -> Tensor:
    """Sum the elements (elements,) of a piece over each matrix, shape (matrices in the unit,)."""
    if piece.unit.count == 1:
        return elements.sum().view(1)
    matrices = piece.unit.layout.matrices(in_zeros(elements, piece))
    return torch.cat([of_shape.sum(dim=(-2, -1)) for of_shape in matrices])


def neuron_sums(elements: Tensor, piece: Piece) -> Tensor:
    """Sum the elements (elements,) of a piece over each neuron, shape (neurons of all matrices in the unit,).

    The sum is zero for neurons of which the piece has no element.
    """
    unit = piece.unit
    if piece.numel == 0:
        return elements.new_zeros(neurons_of(unit).count)
    if not unit.layout.neurons_in_order:
        matrices = unit.layout.matrices(in_zeros(elements, piece))
        return torch.cat([of_shape.sum(inputs_of(unit.layout)).flatten() for of_shape in matrices])
    rows, columns, parts = _rows(piece, elements.device)
    margin = piece.in_unit.start % columns
    padded = pad(elements, (margin, parts.numel() * columns - margin - piece.numel)).view(-1, columns)
    if unit.layout.transposed:
        sums = padded.new_zeros(unit.shape[0], columns)
        return sums.index_add_(0, parts, padded).flatten()
    sums = padded.new_zeros(unit.shape[0] * unit.shape[1])
    sums[rows] = padded.sum(dim=1)
    return sums


def spread_over_neurons(numbers: Tensor, piece: Piece) -> Tensor:
    """Return for each element of a piece the number of its neuron, in the order of :func:`neuron_sums`."""
    unit = piece.unit
    if not unit.layout.neurons_in_order:
        return neurons_of(unit).elements(numbers).flatten()[piece.in_unit]
    rows, columns, parts = _rows(piece, numbers.device)
    of_rows = numbers.view(-1, columns)[parts] if unit.layout.transposed else numbers[rows, None]
    margin = piece.in_unit.start % columns
    return of_rows.expand(-1, columns).reshape(-1)[margin : margin + piece.numel]


def repeated(of_matrices: Tensor, unit: Unit) -> Tensor:
    """Return for each neuron of a unit the number of its matrix."""
    by_shape = zip(of_matrices.split(unit.counts), unit.fans, strict=True)
    return torch.cat([numbers.repeat_interleave(fan_out) for numbers, (fan_out, _) in by_shape])


@lru_cache(maxsize=4096)
def neuron_sizes(piece: Piece, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return for each neuron of the unit how many elements the piece has of it, and which part of it that is."""
    numbers = neuron_sums(torch.ones(piece.numel, dtype=dtype, device=device), piece)
    by_shape = zip(neurons_of(piece.unit).by_shape(numbers), piece.unit.fans, strict=True)
    return numbers, torch.cat([(of_shape / fan_in).flatten() for of_shape, (_, fan_in) in by_shape])


def in_zeros(elements: Tensor, piece: Piece) -> Tensor:
    """Return the unit of a piece, with zeros where the piece has no elements."""
    if piece.numel == piece.unit.numel:
        return elements.view(piece.unit.shape)
    whole = elements.new_zeros(piece.unit.numel)
    whole[piece.in_unit] = elements
    return whole.view(piece.unit.shape)


@dataclass(frozen=True)
class NeuronPieces:
    """The neurons of which this rank has elements, piece by piece; its numbers are means over its own elements.

    Args:
        pieces: What this rank has of each unit of the parameter, none of them empty.
    """

    pieces: Sequence[Piece]

    @property
    def count(self) -> int:
        """Number of neurons in all units of which this rank has a piece."""
        return sum(neurons_of(piece.unit).count for piece in self.pieces)

    def numbers(self, elements: Tensor) -> Tensor:
        """Return the mean of this rank's elements of each neuron, shape (neurons,); zero where it has none."""
        wide = elements.reshape(-1).double()
        means = self._means(wide)
        # As in Neurons.numbers: equal numbers come back as they were.
        return (means + self._means(wide - self.elements(means))).to(elements.dtype)

    def _means(self, elements: Tensor) -> Tensor:
        taken = elements.split([piece.numel for piece in self.pieces])
        found = []
        for part, piece in zip(taken, self.pieces, strict=True):
            numbers, _ = neuron_sizes(piece, part.device, part.dtype)
            found.append(neuron_sums(part, piece) / numbers.clamp_min(1))
        return torch.cat(found) if found else elements.new_zeros(0)

    def elements(self, numbers: Tensor) -> Tensor:
        """Return for each element of this rank the number of its neuron, shape (elements,)."""
        split = numbers.split([neurons_of(piece.unit).count for piece in self.pieces])
        spread = [spread_over_neurons(n, piece) for n, piece in zip(split, self.pieces, strict=True)]
        return torch.cat(spread) if spread else numbers.new_zeros(0)


def _rows(piece: Piece, device: torch.device) -> tuple[slice, int, Tensor]:
    """Return the stored rows of which a piece has elements, their length, and the part of the unit that each is in."""
    unit = piece.unit
    columns = unit.numel // (unit.shape[0] * unit.shape[1])
    rows = slice(piece.in_unit.start // columns, -(-piece.in_unit.stop // columns))
    return rows, columns, torch.arange(rows.start, rows.stop, device=device) // unit.shape[1]
