"""The update of the parameters that Muon owns, as a function."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.neuron_normalization import normalize_neurons
from lightning_muon.optim.orthogonalize import orthogonalize
from lightning_muon.optim.update_scale import nuclear_norm, scale_factor

HALF = (torch.float16, torch.bfloat16)


class OrthogonalizeHook(Protocol):
    """What may listen to the polar factors, see ``MuonAdamW.register_orthogonalize_hook``."""

    def __call__(self, names: list[str], factors: Tensor, /) -> None:
        """Take the polar factors (b, m, n) of a batch, and the name of the parameter that each belongs to."""


@dataclass(frozen=True)
class MuonParameter:
    """A parameter with what its update needs.

    Args:
        name: For messages and hooks.
        parameter: The weights W.
        gradient: Its gradient G, of the same shape.
        momentum: The moving average M, of the same shape: of gradients, or of polar factors with ``polar_first``.
        mean_square: With ``neuron_beta``, the moving average of the squares of its directions, of the same shape.
        layout: Where its matrices are.
    """

    name: str
    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    mean_square: Tensor | None
    layout: MatrixLayout


def muon_update(
    parameters: Sequence[MuonParameter], options: Mapping[str, Any], hooks: Iterable[OrthogonalizeHook] = ()
) -> None:
    """Update parameters in place by one step of Muon; see :class:`~lightning_muon.optim.MuonAdamW` for the options."""
    gradients = [p.gradient for p in parameters]
    momenta = [p.momentum for p in parameters]

    if options["polar_first"]:
        sources = _matrices(parameters, gradients)
        factors = _orthogonalize(parameters, sources, options, hooks)
        averaged = _average([_restored(p, f) for p, f in zip(parameters, factors, strict=True)], momenta, options)
        directions = _matrices(parameters, averaged)
    else:
        sources = _matrices(parameters, _average(gradients, momenta, options))
        directions = factors = _orthogonalize(parameters, sources, options, hooks)

    for p, source, factor, direction in zip(parameters, sources, factors, directions, strict=True):
        scale = scale_factor(options["update_scale"], *p.layout.fans(p.parameter.shape))
        step = _evened_out(p, direction, options)
        if options["update_scale"] == "nuclear_norm":
            step = step * nuclear_norm(source, factor)
        _apply(p.parameter, _restored(p, step), options, scale)


def _average(new: Sequence[Tensor], momenta: Sequence[Tensor], options: Mapping[str, Any]) -> Sequence[Tensor]:
    """M ← μM + (1 − μ)X; return M, or with Nesterov's look ahead (1 − μ)X + μM."""
    new = [x.to(m.dtype) for x, m in zip(new, momenta, strict=True)]
    torch._foreach_lerp_(list(momenta), new, 1 - options["momentum"])
    return torch._foreach_lerp(new, list(momenta), options["momentum"]) if options["nesterov"] else momenta


def _orthogonalize(
    parameters: Sequence[MuonParameter],
    matrices: Sequence[Tensor],
    options: Mapping[str, Any],
    hooks: Iterable[OrthogonalizeHook],
) -> list[Tensor]:
    """Return the polar factors (b, m, n) of each parameter's matrices, computed in batches of one shape."""
    hooks = tuple(hooks)
    factors = list(matrices)
    for members in _batches(matrices, options["batch_elements"]):
        batch = torch.cat([matrices[i] for i in members]) if len(members) > 1 else matrices[members[0]]
        # Not to wait for the device: a gradient that is not finite spoils its own matrix, which the monitors name.
        factor = orthogonalize(
            batch, options["orthogonalizer"], check_finite=False, **options["orthogonalizer_options"]
        )
        for hook in hooks:
            hook([parameters[i].name for i in members for _ in range(len(matrices[i]))], factor)
        for index, piece in zip(members, factor.split([len(matrices[i]) for i in members]), strict=True):
            factors[index] = piece
    return factors


def _batches(matrices: Sequence[Tensor], most_elements: int) -> list[list[int]]:
    """Group matrices of one shape, dtype and device, as many as fit the bound, at least one parameter's."""
    open_batches: dict[Any, list[int]] = {}
    elements: defaultdict[Any, int] = defaultdict(int)
    batches = []
    for index, matrix in enumerate(matrices):
        key = (matrix.device, matrix.dtype, matrix.shape[1:])
        if key not in open_batches or elements[key] + matrix.numel() > most_elements:
            open_batches[key] = []
            elements[key] = 0
            batches.append(open_batches[key])
        open_batches[key].append(index)
        elements[key] += matrix.numel()
    return batches


def _evened_out(p: MuonParameter, direction: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Apply NorMuon's normalization, where it is asked for."""
    if p.mean_square is None:
        return direction
    p.mean_square.lerp_(_restored(p, direction).to(p.mean_square.dtype).square(), 1 - options["neuron_beta"])
    return normalize_neurons(direction, p.layout.matrices(p.mean_square), neurons_are_columns=p.layout.transposed)


def _apply(parameter: Tensor, direction: Tensor, options: Mapping[str, Any], scale: float) -> None:
    """W ← (1 − lr·wd)·W − lr·scale·D; rounded once, since 1.0·(1 − 1e-4) is 1.0 in bf16."""
    lr, decay = options["lr"], options["lr"] * options["weight_decay"]
    weights = parameter.float() if parameter.dtype in HALF else parameter
    if options["cautious_weight_decay"]:
        decayed = weights * (direction * weights >= 0)
        weights = weights.sub_(decayed, alpha=decay)
    else:
        weights = weights.mul_(1 - decay)
    weights.add_(direction, alpha=-lr * scale)
    if weights is not parameter:
        parameter.copy_(weights)


def _matrices(parameters: Sequence[MuonParameter], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [p.layout.matrices(tensor) for p, tensor in zip(parameters, tensors, strict=True)]


def _restored(p: MuonParameter, matrices: Tensor) -> Tensor:
    return p.layout.restore(matrices, p.parameter.shape)
