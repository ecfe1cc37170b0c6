"""The polar factor from the singular value decomposition: the reference."""

import torch
from torch import Tensor


def svd(matrix: Tensor) -> Tensor:
    """Compute the polar factor U Vᵀ from the singular value decomposition U S Vᵀ.

    Singular values at the level of rounding (the machine epsilon times max(m, n), relative to the largest) count as
    zero: a zero matrix, and its zero rows and columns, stay zero. By default it computes in float64 whatever the input,
    so that this level lies far below the singular values of a float32 matrix.

    - Cost: about 14m²n + 8m³ FLOPs for an m×n matrix, m ≤ n, few of them in matrix products: the slowest by far.
    - Error: orthogonal, and with a small backward error, to working precision.
    - When: as the reference for the others, and for small matrices.
    - Source: Golub & Van Loan, "Matrix Computations" (2013), sections 8.6 and 9.4.3.

    Args:
        matrix: Shape (batch, m, n), float32 or float64. A matrix that is not finite gives NaN, the others their factor.

    Returns:
        Shape (batch, m, n).
    """
    finite = matrix.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    # One matrix that is not finite would make LAPACK refuse the batch.
    u, s, vh = torch.linalg.svd(matrix.where(finite, 0), full_matrices=False)
    rounding = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:])
    in_range = (s > rounding * s.amax(dim=-1, keepdim=True)).to(matrix.dtype)
    factor: Tensor = (u * in_range.unsqueeze(-2)) @ vh
    return factor.where(finite, torch.nan)
