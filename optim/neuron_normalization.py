"""The variance normalization of NorMuon: each neuron's update is divided by its own history of sizes."""

import torch
from torch import Tensor

# So that a neuron that never got an update is not divided by zero; arXiv:2510.05491, algorithm 1.
EPS = 1e-8


def normalize_neurons(directions: Tensor, mean_squares: Tensor, neurons_are_columns: bool) -> Tensor:
    """Divide each neuron's part of an update by the root of its average square, and keep the size of the whole.

    Polar factors have singular values near one, but rows of very different norms. Dividing row i by √vᵢ, where v is the
    moving average of the mean square of row i, evens them out; the Frobenius norm stays what it was, so that the update
    scale means the same with and without (Li et al., "NorMuon" (2025), arXiv:2510.05491, algorithm 1).

    Args:
        directions: Polar factors, shape (b, m, n).
        mean_squares: Moving averages of the squares of earlier directions, this one's included, shape (b, m, n).
        neurons_are_columns: Whether the layer is stored (in, out).

    Returns:
        Shape (b, m, n).
    """
    mean_square = mean_squares.float().mean(dim=-2 if neurons_are_columns else -1, keepdim=True)
    normalized = directions / (mean_square.sqrt() + EPS)
    size, new_size = (torch.linalg.matrix_norm(d, keepdim=True) for d in (directions.float(), normalized.float()))
    scaled: Tensor = normalized * (size / new_size.clamp_min(torch.finfo(torch.float32).tiny))
    return scaled


def neuron_factors(mean_squares: Tensor, squares: Tensor) -> Tensor:
    """Return by what :func:`normalize_neurons` multiplies each neuron, from sums over its elements.

    Args:
        mean_squares: The mean of the moving averages of each neuron, shape (b, neurons).
        squares: The sum of the squares of each neuron's direction, shape (b, neurons).

    Returns:
        Shape (b, neurons).
    """
    factors = 1 / (mean_squares.sqrt() + EPS)
    size, new_size = (s.sum(dim=-1, keepdim=True).sqrt() for s in (squares, squares * factors**2))
    scaled: Tensor = factors * (size / new_size.clamp_min(torch.finfo(torch.float32).tiny))
    return scaled
