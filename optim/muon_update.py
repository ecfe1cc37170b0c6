"""The update of the parameters that Muon owns, as a function."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.neuron_normalization import normalize_neurons
from lightning_muon.optim.orthogonalize import orthogonalize
from lightning_muon.optim.parameter_state import HALF
from lightning_muon.optim.update_scale import nuclear_norm, scale_factor

# How many elements go as one batch unless an option says so: enough to keep a GPU busy with small matrices; on a CPU so
# few that what is computed from them stays in its cache (measured by benchmarks/optimizer_step.py).
BATCH_ELEMENTS = {"cpu": 1 << 20}
BATCH_ELEMENTS_ELSEWHERE = 1 << 24


Item = TypeVar("Item")


class OrthogonalizeHook(Protocol):
    """What may listen to the polar factors, see ``MuonAdamW.register_orthogonalize_hook``."""

    def __call__(self, names: list[str], factors: Tensor, /) -> None:
        """Take the polar factors (b, m, n) of a batch, and the name of the parameter that each belongs to."""


@dataclass(frozen=True)
class MuonParameter:
    """A parameter with what its update needs.

    Args:
        name: For messages and hooks.
        weight: The weights W.
        gradient: Their gradient G, of the same shape.
        momentum: The moving average M, of the same shape: of gradients, or of polar factors with ``polar_first``.
        mean_square: With ``neuron_beta``, the moving average of the squares of its directions, of the same shape.
        layout: Where its matrices are.
    """

    name: str
    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    mean_square: Tensor | None
    layout: MatrixLayout


def muon_update(
    parameters: Iterable[MuonParameter], options: Mapping[str, Any], hooks: Sequence[OrthogonalizeHook] = ()
) -> None:
    """Update parameters in place by one step of Muon; see :class:`~lightning_muon.optim.MuonAdamW` for the options.

    Matrices of one shape go together, so many as ``batch_elements`` allows: one batch is all that is copied at a time.
    """
    for batch in batches(parameters, options["batch_elements"]):
        steps = directions(batch, options, hooks)
        scale = scale_factor(options["update_scale"], *batch[0].layout.fans(batch[0].weight.shape))
        apply_directions([p.weight for p in batch], steps, options, scale)


def directions(
    batch: list[MuonParameter], options: Mapping[str, Any], hooks: Sequence[OrthogonalizeHook]
) -> list[Tensor]:
    """Return the direction of the step of each parameter in a batch of :func:`batches`; its average goes on with it."""
    names = [p.name for p in batch for _ in range(p.layout.count(p.weight.shape))] if hooks else []
    gradients = [p.gradient for p in batch]
    if options["polar_first"]:
        source = _matrices(batch, gradients)
        factor = orthogonalize_batch(names, source, options, hooks)
        direction = _matrices(batch, average(batch, _restored(batch, factor), options))
    else:
        source = _matrices(batch, average(batch, gradients, options))
        direction = factor = orthogonalize_batch(names, source, options, hooks)

    if options["neuron_beta"] is not None:
        direction = _evened_out(batch, direction, options["neuron_beta"])
    if options["update_scale"] == "nuclear_norm":
        direction = direction * nuclear_norm(source, factor)
    return _restored(batch, direction)


def batch_bound(batch_elements: int | None, device: torch.device) -> int:
    """Return how many elements go as one batch on a device, if the option says so many, or nothing."""
    return batch_elements or BATCH_ELEMENTS.get(device.type, BATCH_ELEMENTS_ELSEWHERE)


def bounded(items: Iterable[Item], elements: Callable[[Item], int], most_elements: int) -> Iterator[list[Item]]:
    """Cut items into runs of at most so many elements; one too large goes alone."""
    run: list[Item] = []
    total = 0
    for item in items:
        if run and total + elements(item) > most_elements:
            yield run
            run, total = [], 0
        run.append(item)
        total += elements(item)
    if run:
        yield run


def batches(parameters: Iterable[MuonParameter], batch_elements: int | None) -> Iterator[list[MuonParameter]]:
    """Group parameters with matrices of one shape, way of storage, dtype and device; one too large goes alone."""
    alike: defaultdict[Any, list[MuonParameter]] = defaultdict(list)
    for p in parameters:
        fans = p.layout.fans(p.weight.shape)
        alike[p.weight.device, p.weight.dtype, p.momentum.dtype, p.layout.transposed, fans].append(p)
    for (device, *_), members in alike.items():
        yield from bounded(members, lambda p: p.weight.numel(), batch_bound(batch_elements, device))


def average(batch: Sequence[MuonParameter], new: Sequence[Tensor], options: Mapping[str, Any]) -> Sequence[Tensor]:
    """Average: M ← μM + (1 − μ)X in place; return M, or with Nesterov's look ahead (1 − μ)X + μM."""
    momenta = [p.momentum for p in batch]
    new = [x.to(m.dtype) for x, m in zip(new, momenta, strict=True)]
    torch._foreach_lerp_(momenta, new, 1 - options["momentum"])
    return torch._foreach_lerp(new, momenta, options["momentum"]) if options["nesterov"] else momenta


def orthogonalize_batch(
    names: list[str], matrices: Tensor, options: Mapping[str, Any], hooks: Sequence[OrthogonalizeHook]
) -> Tensor:
    """Orthogonalize matrices (b, m, n) as the options say, and tell the hooks; ``names`` has one for each matrix."""
    # Nesterov's look ahead is a copy, that may be overwritten unless the nuclear norm still needs it.
    ours = options["nesterov"] and not options["polar_first"] and options["update_scale"] != "nuclear_norm"
    # Not to wait for the device: a gradient that is not finite spoils its own matrix, which the monitors name.
    factors = orthogonalize(
        matrices,
        options["orthogonalizer"],
        check_finite=False,
        compile=options["compile"],
        out=matrices if ours else None,
        **options["orthogonalizer_options"],
    )
    for hook in hooks:
        hook(names, factors)
    return factors


def _evened_out(batch: list[MuonParameter], direction: Tensor, beta: float) -> Tensor:
    mean_squares = [p.mean_square for p in batch if p.mean_square is not None]
    for mean_square, step in zip(mean_squares, _restored(batch, direction), strict=True):
        mean_square.lerp_(step.to(mean_square.dtype).square(), 1 - beta)
    return normalize_neurons(direction, _matrices(batch, mean_squares), batch[0].layout.transposed)


def apply_directions(weights: list[Tensor], steps: list[Tensor], options: Mapping[str, Any], scale: float) -> None:
    """Step in the directions D: W ← (1 − lr·wd)·W − lr·scale·D; rounded once, since 1.0·(1 − 1e-4) is 1.0 in bf16."""
    lr, decay = options["lr"], options["lr"] * options["weight_decay"]
    wide = [weight.float() if weight.dtype in HALF else weight for weight in weights]
    if options["cautious_weight_decay"]:
        inwards = [weight * (step * weight >= 0) for weight, step in zip(wide, steps, strict=True)]
        torch._foreach_sub_(wide, inwards, alpha=decay)
    elif decay:
        torch._foreach_mul_(wide, 1 - decay)
    torch._foreach_add_(wide, steps, alpha=-lr * scale)
    for weight, new in zip(weights, wide, strict=True):
        if new is not weight:
            weight.copy_(new)


def _matrices(batch: list[MuonParameter], tensors: Sequence[Tensor]) -> Tensor:
    """Lay the matrices of all parameters in one batch (b, m, n)."""
    matrices = [p.layout.matrices(tensor) for p, tensor in zip(batch, tensors, strict=True)]
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


def _restored(batch: list[MuonParameter], matrices: Tensor) -> list[Tensor]:
    """Undo :func:`_matrices`."""
    pieces = matrices.split([p.layout.count(p.weight.shape) for p in batch])
    return [p.layout.restore(piece, p.weight.shape) for p, piece in zip(batch, pieces, strict=True)]
