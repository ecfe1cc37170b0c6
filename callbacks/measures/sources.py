"""What an optimizer is about to orthogonalize: the smallest singular value of each matrix, as the method gets it."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from lightning_muon.callbacks.measures.singular_values import condition_and_stable_rank, tridiagonals, unit_grams

# Where a matrix is: the name of its parameter, and the place of its first element there, if that is known.
Place = tuple[str, int | None]

# Matrices are taken in float64, and so many elements at once, 32 MiB.
_AT_ONCE = 1 << 22


class SourceMeter:
    """Measure matrices before they are orthogonalized, without synchronization.

    Args:
        chosen: The names of the parameters to measure.
        by_eighth_powers: Whether a parameter's matrices are divided by (Σσ⁸)^⅛, not by their Frobenius norm.
    """

    def __init__(self, chosen: Collection[str], by_eighth_powers: Callable[[str], bool]) -> None:
        self._chosen = chosen
        self._by_eighth_powers = by_eighth_powers
        self._measured: list[tuple[list[Place], Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, places: list[Place], matrices: Tensor) -> None:
        """Add matrices (b, m, n), which may change afterwards, and the place of each."""
        if not places:
            return
        taken = [index for index, (name, _) in enumerate(places) if name in self._chosen]
        at_once = max(1, _AT_ONCE // max(1, matrices[0].numel()))
        for start in range(0, len(taken), at_once):
            some = taken[start : start + at_once]
            with torch.autocast(matrices.device.type, enabled=False):
                grams = unit_grams(matrices if len(some) == len(places) else torch.stack([matrices[i] for i in some]))
                norms = torch.ones(len(some), dtype=grams.dtype, device=grams.device)
                if any(map(self._by_eighth_powers, {places[i][0] for i in some})):
                    norms = torch.linalg.matrix_norm(grams @ grams) ** 0.25
                projected = tridiagonals(grams)
            self._measured.append(([places[i] for i in some], projected, norms))

    def finish(self) -> dict[Place, float]:
        """Return the smallest singular value of each matrix over its norm; NaN if that is zero or not finite.

        It ends at about 1e-7, where float32 resolves no more.
        """
        found: dict[Place, float] = {}
        for places, projected, norms in self._measured:
            condition, rank = condition_and_stable_rank(projected.cpu()).unbind(1)
            smallest = 1 / (condition * rank.sqrt())
            of_places = (smallest / norms.cpu()).where(condition > 0, torch.nan).tolist()
            found.update(zip(places, of_places, strict=True))
        return found
