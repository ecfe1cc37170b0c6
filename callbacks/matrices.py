"""Muon's matrices: the parameter groups that hold them, and their names."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.optim.routing.wrapped_names import plain_name
from lightning_muon.optim.update.options import algorithm_of

# Parts of the names of classes that orthogonalize.
_NAMES = ("muon", "polar", "dion", "scion")


class LabelledGroup(NamedTuple):
    """A parameter group and the label under which its values are logged.

    The label is the group's ``name``, or ``group_<place>``. Of groups with one name, the second gets the suffix ``-1``,
    the third ``-2``, and so on.
    """

    label: str
    optimizer: Optimizer
    place: int  # index in the optimizer's param_groups
    group: dict[str, Any]

    @property
    def is_muon(self) -> bool:
        """Whether the group holds Muon's matrices, see :func:`muon_groups`."""
        default = "muon" if isinstance(self.optimizer, torch.optim.Muon) else None
        return bool(self.group.get("algorithm", default) == "muon")

    @property
    def updated_by(self) -> str:
        """What updates it: an algorithm, or the class of the optimizer."""
        return algorithm_of(self.optimizer, self.group)

    @property
    def is_orthogonalized(self) -> bool:
        """Whether its updates are orthogonalized. AdamW, too, may have groups that are marked for Muon."""
        return self.is_muon and orthogonalizes(self.optimizer)

    @property
    def earlier_label(self) -> str:
        """The label of a Muon group before groups were named by role: ``muon`` for ``matrix`` and ``router``."""
        role = str(self.group.get("role", self.label))
        return (
            "muon" + self.label.removeprefix(role).removeprefix("_muon") if self.label.startswith(role) else self.label
        )

    @property
    def shardings(self) -> list[Any]:
        """What each rank has of each parameter, as ``route_parameters`` found it; None where nothing is said."""
        known = getattr(self.optimizer, "_shardings", {})  # MuonAdamW takes them out of its groups
        return list(self.group.get("shardings") or map(known.get, self.group["params"]))

    def named_parameters(self, names: Mapping[int, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter with its name from :func:`module_names`, or the optimizer's if it is not there."""
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


def orthogonalizes(optimizer: Optimizer) -> bool:
    """Return whether an optimizer orthogonalizes: it has the hook, or the name of its class or a parent says so."""
    names = (kind.__name__.lower() for kind in type(optimizer).__mro__)
    return has_factor_hook(optimizer) or any(part in name for name in names for part in _NAMES)


def has_factor_hook(optimizer: Optimizer) -> bool:
    """Return whether an optimizer passes what it orthogonalizes to hooks."""
    return hasattr(optimizer, "register_orthogonalize_hook")


def muon_groups(optimizers: Iterable[Optimizer]) -> list[LabelledGroup]:
    """Return the groups that hold Muon's matrices: those with ``algorithm="muon"``, and all of ``torch.optim.Muon``.

    The algorithm counts, not the optimizer, so that several optimizers can be compared on the same matrices.
    """
    return [labelled for labelled in labelled_groups(optimizers) if labelled.is_muon]


def muon_matrices(optimizers: Iterable[Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return Muon's matrices by their :func:`module_names`; this rank may hold nothing of a sharded one."""
    return {name: matrix for labelled in muon_groups(optimizers) for name, matrix in labelled.named_parameters(names)}


def module_names(module: nn.Module) -> dict[int, str]:
    """Return the name of each parameter by the parameter's ``id``, without the parts that wrappers add."""
    return {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}


def frozen_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that take no gradient; some may be trained later."""
    return [plain_name(name) for name, parameter in module.named_parameters() if not parameter.requires_grad]


def own_names(label: str, group: Mapping[str, Any]) -> list[str]:
    """Return the optimizer's names of a group's parameters: ``param_names``, or else ``<label>.<place>``."""
    return group.get("param_names") or [f"{label}.{place}" for place in range(len(group["params"]))]


def names_in_module(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, str]:
    """Map an optimizer's own names of Muon's matrices, which may be relative to a part, to :func:`module_names`."""
    found: dict[str, str] = {}
    for labelled in muon_groups([optimizer]):
        own_then_module = zip(own_names(labelled.label, labelled.group), labelled.named_parameters(names), strict=True)
        for own, (name, _) in own_then_module:
            found[own] = own if own in found else name  # equal names cannot be distinguished
    return found
