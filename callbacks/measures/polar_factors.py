"""Polar factors: how an optimizer's are found from its steps, and what is measured of them."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.measures.singular_values import lanczos
from lightning_muon.callbacks.measures.sources import Place
from lightning_muon.callbacks.measures.weight_steps import ROUNDINGS, StepOptions
from lightning_muon.callbacks.sampling import SampledParameter
from lightning_muon.callbacks.shards import whole

# So many elements, 4 MiB, stay in the cache of a CPU during Lanczos' iteration: 24 Gram matrices of 768 × 768 took four
# times as long in one batch as in batches of 2 to 8. Small ones are pooled, because calls dominate their time.
POOLED_ELEMENTS = 1 << 20


class AppliedFactors:
    """Find what an optimizer has orthogonalized from how a few weights, given by name, moved in a step.

    A step W' = (1 − ηλ)W − ηsO with scale s is solved for O. The scale of ``torch.optim.Muon`` is known. For any other
    optimizer O is scaled to a mean squared singular value of one, so only the spread is meaningful.
    """

    def __init__(self, optimizer: Optimizer, sampled: Mapping[str, SampledParameter]) -> None:
        self.optimizer = optimizer
        self.sampled = sampled
        self.options = StepOptions(optimizer)
        self._before = {name: chosen.parameter.detach().clone() for name, chosen in sampled.items()}

    @torch.no_grad()
    def found(self, names: Sequence[str]) -> list[tuple[str, Tensor]]:
        """Return the factors (b, m, n) of those parameters that have moved. A collective of all ranks for DTensors.

        The names are of parameters that had a gradient: the others do not even decay. A name occurs once for each shape
        of the matrices in its parameter.
        """
        moves = [(name, move) for name in names for move in self._moves(name, self.sampled[name])]
        seen = [(name, factors[has_moved]) for name, (has_moved, factors) in moves]  # waits for the device
        return [(name, factors) for name, factors in seen if len(factors)]

    def close(self) -> None:
        """Drop the copies, and remove the hook from the optimizer."""
        self.options.close()
        self._before.clear()

    def _moves(self, name: str, chosen: SampledParameter) -> Iterator[tuple[Tensor, Tensor]]:
        """Return for each shape whether its matrices moved by more than rounding, (b,), and their scaled steps."""
        lr, decay = float(self.options.lr(chosen.place)), float(self.options.weight_decay(chosen.place))
        old = self._before[name]
        size = whole(torch.linalg.vector_norm(old))
        step = whole(old.mul_(1 - lr * decay).sub_(chosen.parameter.detach()))
        # torch.optim.Muon has no layouts: it takes a fused projection as one matrix.
        is_torch_muon = isinstance(self.optimizer, torch.optim.Muon)
        by_shape = [step.unsqueeze(0)] if is_torch_muon else chosen.matrices(step)
        count = sum(map(len, by_shape))
        for matrices in by_shape:
            norms = torch.linalg.matrix_norm(matrices, keepdim=True)
            scale = lr * torch_scale(chosen.group, step) if is_torch_muon else norms / min(matrices.shape[-2:]) ** 0.5
            rounding = torch.finfo(step.dtype).eps * size / count**0.5
            # A comparison that is also true for NaN.
            yield ~(norms <= ROUNDINGS * rounding).flatten(), matrices / scale


def torch_scale(group: Mapping[str, Any], weight: Tensor) -> float:
    """Return the scale by which ``torch.optim.Muon`` multiplies the orthogonal factor of a weight (rows, columns).

    Source: ``_adjust_lr`` in https://github.com/pytorch/pytorch/blob/v2.9.0/torch/optim/_muon.py
    """
    rows, columns = weight.shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


class FactorBatch(NamedTuple):
    """Measurements of b polar factors, on their device."""

    places: list[Place]  # the parameter of each factor, and which of its matrices
    errors: Tensor  # (b,), see orthogonality_error
    tridiagonals: Tensor  # (b, 2, k), see lanczos


class FactorMeter:
    """Measure polar factors, without synchronization; small ones of the same smaller side in one batch."""

    def __init__(self) -> None:
        self._waiting: defaultdict[tuple[torch.device, int], list[tuple[list[Place], Tensor]]] = defaultdict(list)
        self._measured: list[FactorBatch] = []

    def add(self, places: list[Place], factors: Tensor) -> None:
        """Add factors (b, m, n), which may change afterwards, and the place of each."""
        grams = gram_matrices(factors)
        waiting = self._waiting[grams.device, grams.shape[-1]]
        waiting.append((places, grams))
        if sum(grams.numel() for _, grams in waiting) >= POOLED_ELEMENTS:
            self._measure(waiting)

    def finish(self) -> list[FactorBatch]:
        """Return the measurements of all factors since the last call."""
        for waiting in self._waiting.values():
            self._measure(waiting)
        measured, self._measured = self._measured, []
        return measured

    def _measure(self, waiting: list[tuple[list[Place], Tensor]]) -> None:
        if not waiting:
            return
        places = [place for some, _ in waiting for place in some]
        grams = torch.cat([grams for _, grams in waiting]) if len(waiting) > 1 else waiting[0][1]
        waiting.clear()
        tridiagonals = lanczos(grams)  # before the error, which changes the matrices
        self._measured.append(FactorBatch(places, orthogonality_error(grams), tridiagonals))


@torch.no_grad()
def gram_matrices(factors: Tensor) -> Tensor:
    """Return OᵀO of each matrix of a batch (b, m, n), or OOᵀ if that is smaller: shape (b, r, r), float32."""
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
