"""The smallest and the largest singular value of many matrices at once, without a decomposition of them."""

import math

import torch
from torch import Tensor

# Up to this rank all values are found; of larger matrices, those that stand apart to three digits. A Gram matrix in
# float32 knows no singular value to better than about 5e-4 of the largest.
LANCZOS_STEPS = 32

# Below this fraction of the largest entry a new direction is rounding: the space of the old ones is complete.
EXHAUSTED = 1e-5


@torch.no_grad()
def lanczos(grams: Tensor, steps: int = LANCZOS_STEPS) -> Tensor:
    """Project symmetric matrices to small tridiagonal ones, whose extreme eigenvalues are nearly the same.

    Lanczos' iteration: in an orthonormal basis of the space of v, Gv, G²v … a symmetric G is tridiagonal. Its extreme
    eigenvalues are found first, and always from inside. There is no wait for the device, and no random number is drawn.
    Source: Golub and Van Loan, "Matrix Computations" (2013), section 10.1; here with full reorthogonalization.

    Args:
        grams: Symmetric, shape (b, r, r).
        steps: The most dimensions k of the small matrices; with k = r they have all eigenvalues.

    Returns:
        Diagonals, and beside them what stands next to each, shape (b, 2, k) with k at most r.
    """
    count, rank, _ = grams.shape
    steps = min(steps, rank)
    # Of no symmetry that a matrix may have; multiples of the golden ratio leave no gaps.
    start = (torch.arange(1, rank + 1, device=grams.device, dtype=grams.dtype) * 0.6180339887).frac() - 0.47
    basis = grams.new_zeros(count, rank, steps)
    entries = grams.new_zeros(count, 2, steps)
    direction = (start / start.norm()).expand(count, rank)
    for step in range(steps):
        basis[:, :, step] = direction
        image = torch.einsum("bij,bj->bi", grams, direction)
        entries[:, 0, step] = (image * direction).sum(-1)
        for _ in range(2):  # once is not enough in float32
            image = image - torch.einsum("bij,bj->bi", basis, torch.einsum("bij,bi->bj", basis, image))
        length = torch.linalg.vector_norm(image, dim=-1)
        entries[:, 1, step] = length
        direction = image / length.clamp_min(torch.finfo(length.dtype).tiny).unsqueeze(-1)
    return entries


def extreme_singular_values(entries: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest singular value of a matrix O from :func:`lanczos` of its OᵀO.

    Args:
        entries: Of one matrix, shape (2, k), on the CPU. NaN gives NaN.
    """
    diagonal, beside = entries.double()
    if not entries.isfinite().all():
        return math.nan, math.nan
    rounding = EXHAUSTED * diagonal.abs().max()
    exhausted = (beside <= rounding).nonzero().flatten().tolist()
    size = exhausted[0] + 1 if exhausted else len(diagonal)
    beside = beside[: size - 1]
    eigenvalues = torch.linalg.eigvalsh(diagonal[:size].diag() + beside.diag(1) + beside.diag(-1)).clamp_min(0)
    return math.sqrt(eigenvalues[0]), math.sqrt(eigenvalues[-1])
