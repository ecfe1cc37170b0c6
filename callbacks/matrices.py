"""Muon's matrices: the parameter groups that hold them, and their names."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.optim.routing.wrapped_names import plain_name


class LabelledGroup(NamedTuple):
    """A parameter group and the label under which its values are logged.

    Args:
        label: The group's ``name``, or ``group_<place>``. Where several groups have one name, the second gets the
            suffix ``-1``, the third ``-2``, and so on.
        optimizer: The optimizer of the group.
        place: Index of the group in the optimizer's ``param_groups``.
        group: The group.
    """

    label: str
    optimizer: Optimizer
    place: int
    group: dict[str, Any]

    @property
    def is_muon(self) -> bool:
        """Whether the group holds Muon's matrices, see :func:`muon_groups`."""
        default = "muon" if isinstance(self.optimizer, torch.optim.Muon) else None
        return bool(self.group.get("algorithm", default) == "muon")

    def named_parameters(self, names: Mapping[int, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter with its name in the module.

        Args:
            names: See :func:`module_names`. A parameter that is not in the module has its name in the optimizer.
        """
        for own, parameter in zip(own_names(self.label, self.group), self.group["params"], strict=True):
            yield names.get(id(parameter), plain_name(own)), parameter


def labelled_groups(optimizers: Iterable[Optimizer]) -> list[LabelledGroup]:
    """Return the groups of all optimizers that have parameters, each with a label of its own."""
    labelled: list[LabelledGroup] = []
    seen: Counter[str] = Counter()
    for optimizer in optimizers:
        for place, group in enumerate(optimizer.param_groups):
            if group["params"]:
                label = str(group.get("name", f"group_{place}"))
                suffix = f"-{seen[label]}" if seen[label] else ""
                seen[label] += 1
                labelled.append(LabelledGroup(f"{label}{suffix}", optimizer, place, group))
    return labelled


def muon_groups(optimizers: Iterable[Optimizer]) -> list[LabelledGroup]:
    """Return the groups that hold Muon's matrices.

    These are the groups with ``algorithm="muon"`` of any optimizer, so that optimizers can be compared on the same
    matrices, and all groups of ``torch.optim.Muon``.
    """
    return [labelled for labelled in labelled_groups(optimizers) if labelled.is_muon]


def muon_matrices(optimizers: Iterable[Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return Muon's matrices by their names in the module; this rank may hold nothing of a sharded one.

    Args:
        optimizers: The optimizers with the groups.
        names: See :func:`module_names`.
    """
    return {name: matrix for labelled in muon_groups(optimizers) for name, matrix in labelled.named_parameters(names)}


def module_names(module: nn.Module) -> dict[int, str]:
    """Return the name of each parameter by the parameter's ``id``, without the parts that wrappers add."""
    return {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}


def own_names(label: str, group: Mapping[str, Any]) -> list[str]:
    """Return the optimizer's names of a group's parameters: ``param_names``, or else ``<label>.<place>``."""
    return group.get("param_names") or [f"{label}.{place}" for place in range(len(group["params"]))]


def names_in_module(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, str]:
    """Map the optimizer's names of Muon's matrices to the names in the module.

    An optimizer of a part of the module has names relative to that part.
    """
    found: dict[str, str] = {}
    for labelled in muon_groups([optimizer]):
        own_then_module = zip(own_names(labelled.label, labelled.group), labelled.named_parameters(names), strict=True)
        for own, (name, _) in own_then_module:
            found[own] = own if own in found else name  # equal names cannot be distinguished
    return found
