"""The update of the parameters that AdamW owns: torch's own function, with care for half precision."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from lightning_muon.optim.state_dtypes import HALF


def adamw_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    square_averages: Sequence[Tensor],
    step_counts: Sequence[Tensor],
    options: Mapping[str, Any],
) -> None:
    """Update parameters in place by one step of AdamW, exactly as ``torch.optim.AdamW`` does in float32.

    Half-precision parameters are updated in float32 and rounded once: float16 rounds eps to zero, and bfloat16 does not
    see a β₂ close to one. Cautious weight decay shrinks only what the step does not push outwards
    (arXiv:2510.12402).

    Args:
        parameters: The weights.
        gradients: Their gradients.
        averages: Moving averages of the gradients, in at least float32.
        square_averages: Moving averages of their squares, in at least float32.
        step_counts: How many steps each has seen, scalars in float32.
        options: ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``cautious_weight_decay``.
    """
    weights = [p if p.dtype not in HALF else p.float() for p in parameters]
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
    for parameter, weight in zip(parameters, weights, strict=True):
        if weight is not parameter:
            parameter.copy_(weight)
