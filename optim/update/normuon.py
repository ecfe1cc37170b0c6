"""The variance normalization of NorMuon: each neuron's update is divided by its own history of sizes."""

import torch
from torch import Tensor

# Keeps a neuron that never had an update from being divided by zero; arXiv:2510.05491, algorithm 1.
EPS = 1e-8


def neuron_factors(mean_squares: Tensor, squares: Tensor) -> Tensor:
    """Return the number that multiplies the update of each neuron.

    Polar factors have singular values near one, but rows of very different norms. Dividing row i by √vᵢ, where v is the
    moving average of the mean square of row i, makes the rows alike. The Frobenius norm of each matrix stays what it
    was, so that the update scale means the same with and without.

    Source: Li et al., "NorMuon" (2025), arXiv:2510.05491, algorithm 1.

    Args:
        mean_squares: Moving averages of the mean square of each neuron's step, this step included, shape (b, neurons).
        squares: The sum of the squares of each neuron's step, shape (b, neurons).

    Returns:
        Shape (b, neurons).
    """
    factors = 1 / (mean_squares.sqrt() + EPS)
    size, new_size = (s.sum(dim=-1, keepdim=True).sqrt() for s in (squares, squares * factors**2))
    scaled: Tensor = factors * (size / new_size.clamp_min(torch.finfo(torch.float32).tiny))
    return scaled
