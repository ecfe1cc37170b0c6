"""What is measured of polar factors, on their device and without waiting for it."""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muon.callbacks.measures.extreme_singular_values import lanczos

# So many elements of Gram matrices, 4 MiB, stay in the cache of a CPU while Lanczos' iteration goes through them again
# and again: 24 of 768 x 768 took four times as long in one batch as in batches of 2 to 8. Smaller ones wait for others,
# because their time is that of the calls.
POOLED_ELEMENTS = 1 << 20


class Measured(NamedTuple):
    """What was measured of some polar factors.

    Args:
        owners: The parameter that each belongs to.
        errors: Shape (b,).
        tridiagonals: What ``lanczos`` has found, shape (b, 2, k).
    """

    owners: list[str]
    errors: Tensor
    tridiagonals: Tensor


class FactorMeter:
    """Measure polar factors as they come, small ones of the same smaller side together."""

    def __init__(self) -> None:
        self._waiting: defaultdict[tuple[torch.device, int], list[tuple[list[str], Tensor]]] = defaultdict(list)
        self._measured: list[Measured] = []

    def add(self, owners: list[str], factors: Tensor) -> None:
        """Take factors (b, m, n), which may change afterwards, and the parameter that each belongs to."""
        grams = gram_matrices(factors)
        waiting = self._waiting[grams.device, grams.shape[-1]]
        waiting.append((owners, grams))
        if sum(grams.numel() for _, grams in waiting) >= POOLED_ELEMENTS:
            self._measure(waiting)

    def finish(self) -> list[Measured]:
        """Return what was measured of all."""
        for waiting in self._waiting.values():
            self._measure(waiting)
        measured, self._measured = self._measured, []
        return measured

    def _measure(self, waiting: list[tuple[list[str], Tensor]]) -> None:
        if not waiting:
            return
        owners = [owner for some, _ in waiting for owner in some]
        grams = torch.cat([grams for _, grams in waiting]) if len(waiting) > 1 else waiting[0][1]
        waiting.clear()
        tridiagonals = lanczos(grams)
        self._measured.append(Measured(owners, orthogonality_error(grams), tridiagonals))


@torch.no_grad()
def gram_matrices(factors: Tensor) -> Tensor:
    """Return OᵀO or OOᵀ of each matrix of a batch (b, m, n), whichever is smaller: shape (b, r, r), float32."""
    # Under manual optimization the step runs inside autocast, which would round the product to half precision.
    with torch.autocast(factors.device.type, enabled=False):
        factors = factors.float() if factors.shape[-2] <= factors.shape[-1] else factors.float().mT
        return factors @ factors.mT


@torch.no_grad()
def orthogonality_error(grams: Tensor) -> Tensor:
    """Return ‖G − I‖_F / √r of each of the :func:`gram_matrices` (b, r, r), which become G − I: shape (b,), float32."""
    grams.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    errors: Tensor = torch.linalg.matrix_norm(grams) / grams.shape[-1] ** 0.5
    return errors
