"""A few of Muon's matrices, whole: what is looked at where looking at all would take too long."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_muon.callbacks.muon_matrices import muon_groups, own_names
from lightning_muon.callbacks.name_choice import NameChoice


class Sampled(NamedTuple):
    """A parameter that was chosen.

    Args:
        parameter: Whole on this rank, or a DTensor.
        layout: Where its matrices are, as its group says, see ``lightning_muon.optim.MatrixLayout``.
        group: The group that it is in.
    """

    parameter: Tensor
    layout: dict[str, Any]
    group: dict[str, Any]


def sampled_matrices(
    optimizers: Iterable[Optimizer],
    names: Mapping[int, str],
    sample: int,
    max_elements: int,
    choice: NameChoice | None = None,
) -> dict[str, Sampled]:
    """Choose Muon's matrices to look at, spread evenly over the model.

    The choice follows from names and global shapes, so that all ranks choose the same. What FSDP1 has flattened to one
    dimension has lost its matrices, and is left out.

    Args:
        optimizers: Whose groups are looked at.
        names: Names of parameters by their ``id``, see ``module_names``.
        sample: The most parameters to choose.
        max_elements: The largest parameter, in elements, over all ranks.
        choice: Whose patterns are followed first, see :func:`spread_evenly`.

    Returns:
        Parameters by name.
    """
    fitting: dict[str, Sampled] = {}
    for optimizer in optimizers:
        for label, group in muon_groups(optimizer):
            layouts = group.get("layouts") or [{}] * len(group["params"])
            for own, parameter, layout in zip(own_names(label, group), group["params"], layouts, strict=True):
                if parameter.ndim >= 2 and 0 < parameter.numel() <= max_elements:
                    fitting[names.get(id(parameter), own)] = Sampled(parameter, layout, group)
    return {name: fitting[name] for name in spread_evenly(list(fitting), sample, choice)}


def spread_evenly(names: list[str], sample: int, choice: NameChoice | None = None) -> list[str]:
    """Choose at most so many names from the first to the last: every n-th would be the same part of each block.

    Args:
        names: From which to choose.
        sample: How many, at most.
        choice: Those that its patterns match are chosen all, however many, and others only if there are fewer.
    """
    asked = set() if choice is None else choice.by_pattern(names)
    others = [name for name in names if name not in asked]
    count = max(0, sample - len(asked))
    places = {round(i * (len(others) - 1) / max(1, count - 1)) for i in range(count)} if others else set()
    asked |= {others[place] for place in places}
    return [name for name in names if name in asked]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shards of all ranks, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def matrices_in(tensor: Tensor, stacked: bool = False, blocks: int = 1, transposed: bool = False) -> Tensor:
    """Return the matrices in a whole parameter, or in what has its shape, one batch (b, m, n).

    Args:
        tensor: With one matrix or several: (rows, columns, …), where what follows the rows are the columns.
        stacked: The first dimension counts matrices.
        blocks: So many matrices lie side by side along the output dimension.
        transposed: The output dimension is the second, not the first.
    """
    matrices = tensor.flatten(start_dim=1 + stacked)
    if not stacked:
        matrices = matrices.unsqueeze(0)
    return torch.cat(matrices.chunk(blocks, dim=-1 if transposed else -2))
