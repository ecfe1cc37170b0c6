"""The update rule of AdamW: torch's own function, with care for half precision and for averages in fewer bytes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lightning_muon.optim.update.batches import batch_bound, bounded
from lightning_muon.optim.update.cautious import decaying
from lightning_muon.optim.update.options import AdamWOptions
from lightning_muon.optim.update.state import HALF, Average


@dataclass(frozen=True)
class AdamWParameter:
    """A parameter with its gradient and the state that this rank has of it.

    Args:
        options: The options of its group.
        weight: The weights.
        gradient: Their gradient; ``None`` if there is none: then nothing is updated.
        state: The moving averages of the gradient and of its square, in at least float32, and the number of steps, a
            scalar in float32; ``None`` without gradient.
    """

    options: AdamWOptions
    weight: Tensor
    gradient: Tensor | None
    state: tuple[Average, Average, Tensor] | None

    @property
    def is_stored_smaller(self) -> bool:
        """Whether its averages must be read and saved."""
        return self.state is not None and self.state[0].dtype != self.state[0].stored.dtype


def adamw_update(parameters: Sequence[AdamWParameter]) -> None:
    """Update parameters in place by one step of AdamW, exactly as ``torch.optim.AdamW`` does in float32.

    On a CPU and with CUDA it takes the fused kernel, as with ``fused=True``, which reads memory once; elsewhere torch's
    default.

    Half-precision parameters are updated in float32 and rounded once: float16 rounds eps to zero, and bfloat16 rounds a
    β₂ close to one to one. Real and imaginary parts of complex parameters are updated as numbers of their own. Cautious
    weight decay shrinks only the weights that the step does not push outwards (arXiv:2510.12402). Averages that are
    stored in fewer bytes are read, updated and saved by batches of at most ``batch_elements``, so that few of them are
    in memory in full.
    """
    alike: defaultdict[int, list[AdamWParameter]] = defaultdict(list)
    for p in parameters:
        if p.gradient is not None:
            alike[id(p.options)].append(p)
    for members in alike.values():
        as_they_are = [p for p in members if not p.is_stored_smaller]
        if as_they_are:
            _update(as_they_are)
        smaller = [part for p in members if p.is_stored_smaller for part in _parts(p)]
        for batch in bounded(smaller, lambda p: p.weight.numel(), _bound(members[0])):
            _update(batch)


def _bound(p: AdamWParameter) -> int:
    return batch_bound(p.options["batch_elements"], p.weight.device)


def _parts(p: AdamWParameter) -> Iterator[AdamWParameter]:
    """Cut a parameter with rows into parts of at most a batch, each with its own count of the same steps."""
    rows = p.weight.shape[0] if p.weight.ndim > 1 else 1
    at_a_time = max(1, _bound(p) * rows // max(1, p.weight.numel()))
    if p.gradient is None or p.state is None or at_a_time >= rows:
        yield p
        return
    average, square_average, steps = p.state
    for start in range(0, rows, at_a_time):
        stop = start + at_a_time
        state = average.rows(start, stop), square_average.rows(start, stop), steps.clone() if start else steps
        yield AdamWParameter(p.options, p.weight[start:stop], p.gradient[start:stop], state)


def _update(parameters: Sequence[AdamWParameter]) -> None:
    """Update parameters with the same options, whose averages are all stored smaller, or none."""
    options = parameters[0].options
    moving = [(p.weight, p.gradient, *p.state) for p in parameters if p.gradient is not None and p.state is not None]
    given, given_gradients, averages, square_averages, step_counts = zip(*moving, strict=True)
    originals, gradients = list(map(_real, given)), list(map(_real, given_gradients))
    first, second = ([_real(average.read()) for average in of_kind] for of_kind in (averages, square_averages))
    weights = [p if p.dtype not in HALF else p.float() for p in originals]
    cautious = options["cautious_weight_decay"]
    before = list(torch._foreach_mul(weights, 1.0)) if cautious else []  # copies, in one launch
    beta1, beta2 = options["betas"]
    is_fused = all(weight.is_cpu or weight.is_cuda for weight in weights)
    counts = _beside(weights, step_counts) if is_fused else list(step_counts)
    adamw(
        weights,
        [g if g.dtype not in HALF else g.float() for g in gradients],
        first,
        second,
        [],
        counts,
        fused=is_fused or None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=options["lr"],
        weight_decay=0.0 if cautious else options["weight_decay"],
        eps=options["eps"],
        maximize=False,
    )
    if counts[0] is not step_counts[0]:
        torch._foreach_add_(list(step_counts), torch.ones(()))  # a number would become a tensor for each of them
    if parameters[0].is_stored_smaller:
        for average, square_average, values, squares, gradient in zip(
            averages, square_averages, first, second, gradients, strict=True
        ):
            average.save(values, gradient)
            square_average.save(squares)
    if cautious:
        decay = options["lr"] * options["weight_decay"]
        torch._foreach_sub_(weights, decaying(before, list(torch._foreach_sub(before, weights))), alpha=decay)
    for original, weight in zip(originals, weights, strict=True):
        if weight is not original:
            original.copy_(weight)


def _beside(weights: Sequence[Tensor], step_counts: Sequence[Tensor]) -> list[Tensor]:
    """Return the counts of steps, which are on the CPU, on the devices of the weights, without waiting for these."""
    if all(weight.is_cpu for weight in weights):
        return list(step_counts)
    counts = torch.stack(list(step_counts))
    copies = {device: counts.to(device, non_blocking=True).unbind() for device in {weight.device for weight in weights}}
    return [copies[weight.device][index] for index, weight in enumerate(weights)]


def _real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a view of shape (…, 2), which torch's kernels take; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
