"""Which parameters the monitors watch: the matrices that Muon updates."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class MuonGroup:
    """A parameter group that Muon updates.

    Args:
        name: The group's ``"name"``, or its position among the groups.
        options: The group itself; changing a hyperparameter in it changes the next step.
        matrices: Its parameters by name.
    """

    name: str
    options: dict[str, Any]
    matrices: Mapping[str, Tensor]


def muon_groups(optimizer: Optimizer, module: LightningModule) -> list[MuonGroup]:
    """Return the groups of an optimizer that hold Muon's matrices.

    These are the groups with ``algorithm="muon"``, whatever optimizer updates them, so that another one can be compared
    on the same matrices; and all groups of ``torch.optim.Muon``.

    Args:
        optimizer: The optimizer.
        module: Gives names to parameters whose group has none.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = []
    for index, group in enumerate(optimizer.param_groups):
        default = "muon" if isinstance(optimizer, torch.optim.Muon) else None
        if group.get("algorithm", default) == "muon" and group["params"]:
            own_names = group.get("param_names") or [
                names.get(id(p), f"{index}.{i}") for i, p in enumerate(group["params"])
            ]
            label = str(group.get("name", f"group_{index}"))
            found.append(MuonGroup(label, group, dict(zip(own_names, group["params"], strict=True))))
    return found


def muon_matrices(optimizer: Optimizer, module: LightningModule) -> dict[str, Tensor]:
    """Return Muon's matrices by name, see :func:`muon_groups`."""
    return {name: matrix for group in muon_groups(optimizer, module) for name, matrix in group.matrices.items()}


def root_mean_square(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the RMS of each tensor, shape (tensors,), float32."""
    norms = torch._foreach_norm(list(tensors.values()), ord=2, dtype=torch.float32)
    return torch.stack([norm / tensor.numel() ** 0.5 for norm, tensor in zip(norms, tensors.values(), strict=True)])


def summarize(quantity: str, values: Mapping[str, float], per_parameter: bool) -> Iterator[tuple[str, float]]:
    """Yield the tags ``quantity/max``, ``/mean`` and ``/min``, and one a parameter if asked for, with their values."""
    if values:
        yield f"{quantity}/max", max(values.values())
        yield f"{quantity}/mean", sum(values.values()) / len(values)
        yield f"{quantity}/min", min(values.values())
        if per_parameter:
            yield from ((f"{quantity}/{name}", value) for name, value in values.items())
