"""Which parameters the monitors watch: the matrices that Muon updates."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.group_labels import group_label
from lightning_muon.callbacks.name_choice import NameChoice

HALF = (torch.float16, torch.bfloat16)

# What stands in a tag where a single matrix has its name.
SUMMARIES = ("max", "mean", "min")

# What torch.compile, FSDP and activation checkpointing put into the names of parameters.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def muon_groups(optimizer: Optimizer) -> list[tuple[str, dict[str, Any]]]:
    """Return the parameter groups of an optimizer that hold Muon's matrices, each with its name or position.

    These are the groups with ``algorithm="muon"``, whatever optimizer updates them, so that another one can be compared
    on the same matrices; and all groups of ``torch.optim.Muon``.
    """
    return [
        (group_label(index, group), group)
        for index, group in enumerate(optimizer.param_groups)
        if group["params"] and is_muon(optimizer, group)
    ]


def is_muon(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group of an optimizer holds Muon's matrices, see :func:`muon_groups`."""
    return bool(group.get("algorithm", "muon" if isinstance(optimizer, torch.optim.Muon) else None) == "muon")


def muon_matrices(optimizers: Iterable[Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return Muon's matrices by their names in the module; of sharded ones this rank may hold nothing.

    Args:
        optimizers: Whose groups are looked at.
        names: What :func:`module_names` returns.
    """
    return {name: matrix for optimizer in optimizers for _, name, matrix in _named_matrices(optimizer, names)}


def names_in_module(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, str]:
    """Return the names in the module of the matrices that an optimizer calls otherwise, such as relative to a part."""
    found: dict[str, str] = {}
    for own, name, _ in _named_matrices(optimizer, names):
        found[own] = own if own in found else name  # two of one name cannot be told apart
    return found


def module_names(module: LightningModule) -> dict[int, str]:
    """Return the name of each parameter in the module by the parameter's ``id``, without the prefixes of wrappers."""
    return {id(parameter): _without_wrappers(name) for name, parameter in module.named_parameters()}


def own_names(label: str, group: Mapping[str, Any]) -> list[str]:
    """Return what an optimizer calls the parameters of a group, or their places in the group of that label."""
    return group.get("param_names") or [f"{label}.{place}" for place in range(len(group["params"]))]


def entry_norms(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor's entries, shape (tensors,), float32 on the device of the first."""
    tensors = list(tensors)
    batches: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        batches[tensor.device, tensor.dtype].append(index)
    norms = torch.empty(len(tensors), device=tensors[0].device if tensors else None)
    for (_, dtype), members in batches.items():
        # A norm is never computed in less than its tensor has, nor rounded to half precision.
        widened = torch.float32 if dtype in HALF else None
        found = torch.stack(torch._foreach_norm([tensors[i] for i in members], dtype=widened))
        if len(batches) == 1:
            return found.float()
        norms[members] = found.to(norms.device, torch.float32)
    return norms


def largest_entries(tensors: Iterable[Tensor]) -> Tensor:
    """Return the largest magnitude of each tensor's entries, shape (tensors,), float32 on the device of the first.

    It is 0 of an empty tensor, and NaN where an entry is.
    """
    tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if not tensors:
        return torch.empty(0)
    # Of both extremes, to go through memory once and copy nothing.
    extremes = [value.to(tensors[0].device, torch.float32) for tensor in tensors for value in torch.aminmax(tensor)]
    return torch.stack(extremes).view(-1, 2).abs().amax(1)


def summarize(quantity: str, values: Mapping[str, float], chosen: NameChoice) -> Iterator[tuple[str, float]]:
    """Yield the tags ``quantity/max``, ``/mean`` and ``/min``, and one for each chosen name, with their values.

    Where one value is NaN, so are all three: that is what the summary is looked at for. A module that is called
    ``max``, ``mean`` or ``min`` has a dot before its name.
    """
    if values:
        numbers = [math.nan] if any(map(math.isnan, values.values())) else list(values.values())
        yield f"{quantity}/max", max(numbers)
        yield f"{quantity}/mean", sum(numbers) / len(numbers)
        yield f"{quantity}/min", min(numbers)
        for name, value in values.items():
            if chosen.takes(name):
                yield f"{quantity}/{'.' if name in SUMMARIES else ''}{name}", value


def _named_matrices(optimizer: Optimizer, names: Mapping[int, str]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield each matrix with the optimizer's name for it and the module's."""
    for label, group in muon_groups(optimizer):
        for own, matrix in zip(own_names(label, group), group["params"], strict=True):
            yield own, names.get(id(matrix), _without_wrappers(own)), matrix


def _without_wrappers(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
