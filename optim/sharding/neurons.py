"""What concerns the neurons of a layer, computed from a piece of its matrix."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_muon.optim.sharding.ownership import Unit


def neurons_per_matrix(unit: Unit) -> int:
    """Return the number of neurons, the outputs, of each matrix in a unit."""
    return unit.layout.fans(unit.shape)[0]


def neuron_sums(piece: Tensor, unit: Unit, start: int) -> Tensor:
    """Sum over each neuron what a piece has of its elements.

    Args:
        piece: Shape (elements,).
        unit: Of which it is a piece.
        start: The place of its first element in the unit.

    Returns:
        Shape (neurons of all matrices in the unit,), float32; zero where the piece has nothing of a neuron.
    """
    rows, columns, parts = _touched(unit, start, start + piece.numel(), piece.device)
    margin = start % columns
    padded = pad(piece.float(), (margin, parts.numel() * columns - margin - piece.numel()))
    padded = padded.view(-1, columns)
    if unit.layout.transposed:
        sums = padded.new_zeros(unit.shape[0], columns)
        return sums.index_add_(0, parts, padded).flatten()
    sums = padded.new_zeros(unit.shape[0] * unit.shape[1])
    sums[rows] = padded.sum(dim=1)
    return sums


def spread_over(values: Tensor, unit: Unit, start: int, stop: int) -> Tensor:
    """Give each element of a piece the value of its neuron.

    Args:
        values: One for each neuron, as :func:`neuron_sums` orders them.
        unit: Of which it is a piece.
        start: The place in the unit of the piece's first element.
        stop: The place behind its last.

    Returns:
        Shape (stop − start,).
    """
    rows, columns, parts = _touched(unit, start, stop, values.device)
    of_rows = values.view(-1, columns)[parts] if unit.layout.transposed else values[rows, None].expand(-1, columns)
    margin = start % columns
    return of_rows.reshape(-1)[margin : margin + stop - start]


def _touched(unit: Unit, start: int, stop: int, device: torch.device) -> tuple[slice, int, Tensor]:
    """Return the stored rows of which a piece has something, their length, and the part of the unit each is in."""
    columns = unit.numel // (unit.shape[0] * unit.shape[1])
    rows = slice(start // columns, -(-stop // columns))
    return rows, columns, torch.arange(rows.start, rows.stop, device=device) // unit.shape[1]
