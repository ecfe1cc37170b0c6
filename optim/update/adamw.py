"""The update rule of AdamW: torch's own function, with care for half precision."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.adamw import adamw

from lightning_muon.optim.update.options import AdamWOptions
from lightning_muon.optim.update.state import HALF

# A weight, its gradient, the moving averages of the gradient and of its square, and the number of steps.
AdamWParameter = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def adamw_update(parameters: Sequence[AdamWParameter], options: AdamWOptions) -> None:
    """Update parameters in place by one step of AdamW, exactly as ``torch.optim.AdamW`` does in float32.

    On a CPU it takes the fused kernel, as with ``fused=True``, which reads memory once and takes a seventh of the time
    (``benchmarks/optimizer_step.py``); elsewhere torch's default.

    Half-precision parameters are updated in float32 and rounded once: float16 rounds eps to zero, and bfloat16 rounds a
    β₂ close to one to one. Cautious weight decay shrinks only the weights that the step does not push outwards
    (arXiv:2510.12402).

    Args:
        parameters: Each with its gradient and state: the averages in at least float32, the count a scalar in float32.
        options: Those of the parameter group.
    """
    if not parameters:
        return
    originals, gradients, averages, square_averages, step_counts = zip(*parameters, strict=True)
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
