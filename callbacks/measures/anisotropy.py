"""How unevenly matrices stretch: condition number and stable rank of many at once, without a decomposition of them."""

import torch
from torch import Tensor

from lightning_muon.callbacks.measures.extreme_singular_values import lanczos

# What is added to the diagonal of a Gram matrix of trace one, so that rounding in float64 (2e-16) leaves it positive.
SHIFT = 1e-15

# Where σ_min / σ_max is below float32's rounding (6e-8), it is not known: the condition number ends here.
LARGEST_CONDITION = 1e7


@torch.no_grad()
def unit_grams(matrices: Tensor) -> Tensor:
    """Return GGᵀ / ‖G‖_F² of each matrix (b, m, n), or GᵀG, whichever is smaller: shape (b, r, r), float64.

    Their eigenvalues are the squared singular values, as fractions of their sum. Of a matrix of zeros it is zero, of
    one with an entry that is not finite it is NaN.
    """
    if matrices.device.type == "mps":  # which has no float64
        matrices = matrices.cpu()
    wide = (matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT).double()
    grams = wide @ wide.mT
    traces = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    return grams / torch.where(traces == 0, 1.0, traces)[:, None, None]


@torch.no_grad()
def tridiagonals(grams: Tensor) -> Tensor:
    """Project Gram matrices G and (G + SHIFT·I)⁻¹ to small matrices with the same largest eigenvalue.

    The largest eigenvalue of the inverse is 1 / (σ_min² + SHIFT). Lanczos' iteration finds it at once where σ_min is
    small, which from G it would find last. There is no wait for the device.

    Args:
        grams: Of :func:`unit_grams`, shape (b, r, r).

    Returns:
        Of both, what :func:`lanczos` returns: shape (b, 2, 2, k).
    """
    count = len(grams)
    traces = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    usable = traces > 0  # not zero, nor NaN
    # In place where that is possible: most of the time goes into memory that is touched for the first time.
    both = torch.cat([grams, grams])
    shifted = fill_diagonal_where(both[:count], ~usable, 1.0)
    shifted.diagonal(dim1=-2, dim2=-1).add_(SHIFT)  # which the largest eigenvalue does not see
    factors, failed = torch.linalg.cholesky_ex(shifted)
    # Where rounding was larger than the shift, the smallest singular value is not known.
    torch.cholesky_inverse(fill_diagonal_where(factors, failed > 0, SHIFT**0.5), out=both[count:])
    found = torch.stack(lanczos(both).chunk(2), dim=1)
    return found * torch.where(usable, 1.0, traces)[:, None, None, None]


def fill_diagonal_where(matrices: Tensor, where: Tensor, value: float) -> Tensor:
    """Make some of the matrices (b, r, r) a multiple of the identity, in place, and return all."""
    matrices.masked_fill_(where[:, None, None], 0.0).diagonal(dim1=-2, dim2=-1).add_(where[:, None] * value)
    return matrices


@torch.no_grad()
def condition_and_stable_rank(tridiagonals: Tensor) -> Tensor:
    """Return κ = σ_max / σ_min and ‖G‖_F² / σ_max² of each matrix from its :func:`tridiagonals`, on the CPU.

    κ is at most ``LARGEST_CONDITION``. Both are found from inside, never too large a κ, nor too small a rank:
    to 0.3 % for random matrices, whose singular values lie dense at the ends, and better for others.

    Args:
        tridiagonals: Shape (b, 2, 2, k).

    Returns:
        Shape (b, 2). Of a matrix of zeros, that has neither, both are zero; of one that is not finite, NaN.
    """
    diagonal, beside = tridiagonals.unbind(2)
    beside = beside[..., :-1]
    small = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    finite = tridiagonals.isfinite().flatten(1).all(1)
    # What is not finite would make the decomposition fail.
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[:, None, None, None], small, 0.0))
    largest, inverse = eigenvalues[..., -1].unbind(-1)
    smallest = torch.maximum(1 / inverse - SHIFT, largest / LARGEST_CONDITION**2)
    is_zero = largest <= 0
    condition = torch.where(is_zero, 0.0, (largest / smallest).sqrt())
    stable_rank = torch.where(is_zero, 0.0, 1 / largest)
    return torch.where(finite[:, None], torch.stack([condition, stable_rank], dim=1), torch.nan)
