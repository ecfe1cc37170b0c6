"""What an optimizer has orthogonalized, found from what it did to a few weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.muon_matrices import HALF
from lightning_muon.callbacks.name_choice import NameChoice
from lightning_muon.callbacks.sampled_matrices import Sampled, matrices_in, sampled_matrices, spread_evenly, whole
from lightning_muon.callbacks.step_options import StepOptions

# Of a step smaller than this many roundings of the weights, more than about a hundredth is rounding.
ROUNDINGS = 128


class AppliedFactors:
    r"""Weights before a step, from which :meth:`found` tells afterwards what the optimizer has orthogonalized.

    A step :math:`W' = (1 - \eta\lambda) W - \eta s O` with learning rate :math:`\eta`, decoupled weight decay
    :math:`\lambda` and a scale :math:`s` is solved for :math:`O`. Of ``torch.optim.Muon`` the scale is known. Of any
    other optimizer it is not: there :math:`O` is scaled so that the mean of its squared singular values is one, and
    only their spread counts.

    Args:
        optimizer: Whose step it is.
        sampled: The parameters that are looked at, by name.
    """

    def __init__(self, optimizer: Optimizer, sampled: Mapping[str, Sampled]) -> None:
        self.optimizer = optimizer
        self.sampled = sampled
        self.options = StepOptions(optimizer)
        self._before = {name: chosen.parameter.detach().clone() for name, chosen in sampled.items()}

    @torch.no_grad()
    def found(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the matrices (b, m, n) of each parameter that have moved; a collective where it is sharded.

        Args:
            names: Of those among the sampled that had a gradient. Others do not even decay.
        """
        moves = {name: self._move(name, self.sampled[name]) for name in names}
        seen = {name: move.factors[move.seen] for name, move in moves.items()}  # waits for the device
        return {name: factors for name, factors in seen.items() if len(factors)}

    def close(self) -> None:
        """Forget the weights, and listen no longer to the optimizer."""
        self.options.close()
        self._before.clear()

    def _move(self, name: str, chosen: Sampled) -> "Move":
        index = next(i for i, group in enumerate(self.optimizer.param_groups) if group is chosen.group)
        lr, decay = float(self.options.lr(index)), float(self.options.weight_decay(index))
        old = self._before[name]
        size = whole(torch.linalg.vector_norm(old))
        step = whole(old.mul_(1 - lr * decay).sub_(chosen.parameter.detach()))
        # torch's Muon knows no layout: a fused projection is one matrix to it.
        is_torchs = isinstance(self.optimizer, torch.optim.Muon)
        matrices = step.unsqueeze(0) if is_torchs else matrices_in(step, **chosen.layout)
        norms = torch.linalg.matrix_norm(matrices, keepdim=True)
        scale = lr * torch_scale(chosen.group, step) if is_torchs else norms / min(matrices.shape[-2:]) ** 0.5
        rounding = torch.finfo(step.dtype).eps * size / len(matrices) ** 0.5
        # Written so that NaN is seen.
        return Move(~(norms <= ROUNDINGS * rounding).flatten(), matrices / scale)


class Move(NamedTuple):
    """How the matrices of a parameter have moved.

    Args:
        seen: Whether by more than rounding, shape (b,).
        factors: Their steps, scaled, shape (b, m, n).
    """

    seen: Tensor
    factors: Tensor


def torch_scale(group: Mapping[str, Any], weight: Tensor) -> float:
    """Return by what ``torch.optim.Muon`` multiplies the orthogonal factor of a weight (rows, columns).

    Source: ``_adjust_lr`` in https://github.com/pytorch/pytorch/blob/v2.9.0/torch/optim/_muon.py
    """
    rows, columns = weight.shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def orthogonalizes(optimizer: Optimizer) -> bool:
    """Whether an optimizer may orthogonalize: of those in ``torch.optim``, and what derives from them, only Muon."""
    if isinstance(optimizer, torch.optim.Muon):
        return True
    plain = (kind for kind in type(optimizer).__mro__ if issubclass(kind, Optimizer) and kind is not Optimizer)
    return not any(kind.__module__.startswith("torch.optim.") for kind in plain)


def fitting_sample(
    optimizer: Optimizer, names: Mapping[int, str], sample: int, max_elements: int, choice: NameChoice | None = None
) -> dict[str, Sampled]:
    """Choose the parameters to look at, spread evenly over those whose step is not hidden by half precision."""
    everything = sum(len(group["params"]) for group in optimizer.param_groups)
    fitting = {
        name: chosen
        for name, chosen in sampled_matrices([optimizer], names, everything, max_elements).items()
        if chosen.parameter.dtype not in HALF
    }
    return {name: fitting[name] for name in spread_evenly(list(fitting), sample, choice)}
