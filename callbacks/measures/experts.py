"""How alike the experts of a layer are trained: the size of each one's gradient."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.matrices import muon_groups
from lightning_muon.callbacks.shards import Shard, entry_norms, find_shards, local_gradients, over_ranks
from lightning_muon.optim.sharding.dtensor import dtensor_sharding, is_dtensor, is_sharded_by_rows
from lightning_muon.optim.update.matrix_layout import matrix_layouts

# The number of an expert in a list of them.
_EXPERT = re.compile(r"(?P<before>(?:.*\.)?[^.]*(?:expert|moe)[^.]*)\.\d+(?P<behind>\..+)", re.IGNORECASE)


class _Stack(NamedTuple):
    """A parameter with experts."""

    layer: str
    parameter: Tensor
    of_an_expert: int  # elements
    elements: int  # of all
    here: tuple[int, int]  # those that this rank has


@dataclass(frozen=True)
class ExpertGradients:
    """Norms of the gradients of experts, on this rank.

    Attributes:
        layers: For each expert the layer that it belongs to: its name, with a star for the expert's number in a list.
        shards: What this rank has of each expert's gradient.
        norms: Of these, shape (experts,).
        entries: Their numbers of elements, also where there is no gradient.
    """

    layers: list[str]
    shards: list[Shard]
    norms: Tensor
    entries: list[int]


@torch.no_grad()
def expert_gradients(trainer: Trainer, optimizer: Optimizer, names: Mapping[int, str]) -> ExpertGradients | None:
    """Measure the gradients of the experts among Muon's matrices; ``None`` if there are none. No communication.

    Experts are the entries of a stack (E, m, n), and the members of a list in whose path is ``expert`` or ``moe``.
    """
    stacks: list[_Stack] = []
    for labelled in muon_groups([optimizer]):
        layouts = matrix_layouts(labelled.group)
        for (name, parameter), layout, known in zip(
            labelled.named_parameters(names), layouts, labelled.shardings, strict=True
        ):
            if is_dtensor(parameter) and not is_sharded_by_rows(parameter):
                continue
            # None where this rank has all of it.
            sharding = dtensor_sharding(parameter) if is_dtensor(parameter) else known
            shape = parameter.shape if sharding is None else sharding.shape
            whole = (0, shape.numel()) if sharding is None else sharding.shard
            if layout.stacked and len(shape) > 2:
                stacks.append(_Stack(name, parameter, shape[1:].numel(), shape.numel(), whole))
            elif found := _EXPERT.fullmatch(name):
                layer = f"{found['before']}.*{found['behind']}"
                stacks.append(_Stack(layer, parameter, shape.numel(), shape.numel(), whole))
    if not stacks:
        return None
    parameters = [stack.parameter for stack in stacks]
    layers, shards, entries = [], [], []
    for stack, shard, gradient in zip(
        stacks, find_shards(trainer, parameters), local_gradients(parameters), strict=True
    ):
        start, stop = stack.here
        for first in range(0, stack.elements, stack.of_an_expert):
            low = min(max(first, start), stop)
            high = max(min(first + stack.of_an_expert, stop), low)
            layers.append(stack.layer)
            shards.append(replace(shard, local=gradient.reshape(-1)[low - start : high - start]))
            entries.append(high - low)
    return ExpertGradients(layers, shards, entry_norms(shard.local for shard in shards), entries)


def balances(trainer: Trainer, found: ExpertGradients) -> dict[str, float]:
    """Return for each layer the RMS of the least of its experts' gradients over their mean RMS. A collective.

    Layers without a gradient, or with one expert, are left out.
    """
    of_ranks = over_ranks(trainer, found.shards, [found.norms], found.entries)
    sizes: defaultdict[str, list[float]] = defaultdict(list)
    for layer, size in zip(found.layers, (of_ranks.norm[0] / of_ranks.entries.sqrt()).tolist(), strict=True):
        sizes[layer].append(size)
    means = {layer: sum(of_layer) / len(of_layer) for layer, of_layer in sizes.items() if len(of_layer) > 1}
    return {layer: min(sizes[layer]) / mean for layer, mean in means.items() if mean != 0}  # or NaN
