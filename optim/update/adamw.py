"""The update rule of AdamW: torch's own function, with care for half precision."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lightning_muon.optim.update.options import AdamWOptions
from lightning_muon.optim.update.state import HALF


@dataclass(frozen=True)
class AdamWParameter:
    """A parameter with its gradient and the state that this rank has of it.

    Args:
        weight: The weights.
        gradient: Their gradient; ``None`` if there is none: then nothing is updated.
        state: The moving averages of the gradient and of its square, in at least float32, and the number of steps, a
            scalar in float32; ``None`` without gradient.
    """

    weight: Tensor
    gradient: Tensor | None
    state: tuple[Tensor, Tensor, Tensor] | None


def adamw_update(parameters: Sequence[AdamWParameter], options: AdamWOptions) -> None:
    """Update parameters in place by one step of AdamW, exactly as ``torch.optim.AdamW`` does in float32.

    On a CPU it takes the fused kernel, as with ``fused=True``, which reads memory once and takes a seventh of the time
    (``benchmarks/optimizer_step.py``); elsewhere torch's default.

    Half-precision parameters are updated in float32 and rounded once: float16 rounds eps to zero, and bfloat16 rounds a
    β₂ close to one to one. Cautious weight decay shrinks only the weights that the step does not push outwards
    (arXiv:2510.12402). Real and imaginary parts of complex parameters are updated as numbers of their own.
    """
    moving = [
        (*map(_real, (p.weight, p.gradient, *p.state)),)
        for p in parameters
        if p.gradient is not None and p.state is not None
    ]
    if not moving:
        return
    originals, gradients, averages, square_averages, step_counts = zip(*moving, strict=True)
    weights = [p if p.dtype not in HALF else p.float() for p in originals]
    cautious = options["cautious_weight_decay"]
    before = [weight.clone() for weight in weights] if cautious else []
    beta1, beta2 = options["betas"]
    adamw(
        weights,
        [g if g.dtype not in HALF else g.float() for g in gradients],
        list(averages),
        list(square_averages),
        [],
        list(step_counts),
        fused=True if all(weight.is_cpu for weight in weights) else None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=options["lr"],
        weight_decay=0.0 if cautious else options["weight_decay"],
        eps=options["eps"],
        maximize=False,
    )
    for weight, old in zip(weights, before, strict=False):
        weight.sub_(old * ((old - weight) * old >= 0), alpha=options["lr"] * options["weight_decay"])
    for original, weight in zip(originals, weights, strict=True):
        if weight is not original:
            original.copy_(weight)


def _real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a view of shape (…, 2), which torch's kernels take; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
