"""Weights of fixed norm: steps that turn a matrix without changing its norm."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_muon.optim.update.options import MuonOptions


def fixed_norm_step(norms: Sequence[Tensor], options: MuonOptions, elements: int) -> tuple[Tensor, Tensor]:
    """Return the numbers c and a, shape (b,), for which W − cW − aD is each matrix W after a step of fixed norm.

    The rule is W ← R·W'/‖W'‖ with W' = W − lr·R·D/‖D‖, where R = ‖W‖ is the Frobenius norm at the start, which no step
    changes: ``lr`` is the length of a step relative to the norm. A matrix that is smaller than the option
    ``fixed_norm`` says, such as one that starts at zero, takes its steps as if it had that norm, and grows by them
    until it has that norm. It does not shrink, so that rounding to just below that norm does not set it free again.

    Source: Wen et al., "Hyperball Optimization" (2026), arXiv:2606.16899; the growth is an addition.

    Args:
        norms: ‖W‖², ⟨W, D⟩ and ‖D‖² of each matrix, shape (b,).
        options: ``lr``; ``fixed_norm``, an RMS.
        elements: Number of elements of a matrix.
    """
    square, product, step_square = norms
    least_norm = (options["fixed_norm"] or 0.0) * math.sqrt(elements)
    norm = square.sqrt()
    length = options["lr"] * norm.clamp_min(least_norm) / step_square.sqrt()
    length = torch.where(step_square > 0, length, 0)
    new = (square - 2 * length * product + length.square() * step_square).clamp_min(0).sqrt()
    wanted = torch.maximum(norm, new.clamp_max(least_norm))
    kept = torch.where(new > 0, wanted / new, 1)
    return 1 - kept, kept * length
