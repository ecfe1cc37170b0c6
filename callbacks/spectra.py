"""The singular values of the weights that Muon updates: which matrices are looked at, and their values."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_muon.callbacks.muon_matrices import module_names, muon_groups, own_names


def sampled_matrices(
    optimizers: Iterable[Optimizer], module: LightningModule, sample: int, max_elements: int
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Choose Muon's matrices to look at, spread evenly over the model.

    The choice follows from names and global shapes, so that all ranks choose the same. What FSDP1 has flattened to one
    dimension has lost its matrices, and is left out.

    Args:
        optimizers: Of the trainer.
        module: Whose names are used.
        sample: The most parameters to choose.
        max_elements: The largest parameter, in elements, over all ranks.

    Returns:
        Parameters by name, each with the layout that its group gives, see ``lightning_muon.optim.MatrixLayout``.
    """
    names = module_names(module)
    fitting: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    for optimizer in optimizers:
        for label, group in muon_groups(optimizer):
            layouts = group.get("layouts") or [{}] * len(group["params"])
            for own, parameter, layout in zip(own_names(label, group), group["params"], layouts, strict=True):
                if parameter.ndim >= 2 and 0 < parameter.numel() <= max_elements:
                    fitting[names.get(id(parameter), own)] = parameter, layout
    found = list(fitting.items())
    # From the first to the last: every n-th would be the same part of each block.
    places = {round(i * (len(found) - 1) / max(1, sample - 1)) for i in range(sample)} if found else set()
    return dict(found[place] for place in sorted(places))


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """Return a parameter with the shards of all ranks, which must all call this."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


@torch.no_grad()
def singular_values(
    parameter: Tensor, stacked: bool = False, blocks: int = 1, transposed: bool = False
) -> Tensor | None:
    """Return the singular values of all matrices in a whole parameter, shape (values,), float32.

    Args:
        parameter: With one matrix or several: (rows, columns, …), where what follows the rows are the columns.
        stacked: The first dimension counts matrices.
        blocks: So many matrices lie side by side along the output dimension.
        transposed: The output dimension is the second, not the first.

    Returns:
        ``None`` if an entry is not finite: there are no singular values then.
    """
    if not parameter.isfinite().all():
        return None
    matrices = parameter.float().flatten(start_dim=1 + stacked)
    parts = matrices.chunk(blocks, dim=-1 if transposed else -2)
    return torch.cat([torch.linalg.svdvals(part).flatten() for part in parts])
