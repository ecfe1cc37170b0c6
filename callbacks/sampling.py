"""Samples of Muon's parameters, for measurements that would take too long on all of them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.arguments import NameChoice
from lightning_muon.callbacks.matrices import muon_groups
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.optim.update.state import HALF


class SampledParameter(NamedTuple):
    """A parameter of the sample."""

    parameter: Tensor  # whole, or a DTensor
    layout: dict[str, Any]  # arguments of its MatrixLayout, from the group
    group: dict[str, Any]
    place: int  # index of the group in the optimizer's param_groups

    def matrices(self, whole: Tensor) -> list[Tensor]:
        """Return the matrices in the whole parameter, or in a tensor of its shape: (b, m, n) for each shape."""
        return MatrixLayout(**self.layout).matrices(whole)


def sampled_matrices(
    optimizers: Iterable[Optimizer],
    names: Mapping[int, str],
    sample: int,
    max_elements: int,
    choice: NameChoice | None = None,
    half: bool = True,
) -> dict[str, SampledParameter]:
    """Choose parameters with Muon's matrices, by name, spread evenly over the model.

    The choice depends on names, global shapes and dtypes alone, so it is the same on all ranks. Parameters that FSDP1
    has flattened to one dimension are left out.

    Args:
        optimizers: The optimizers with the groups.
        names: See :func:`~lightning_muon.callbacks.matrices.module_names`.
        sample: The largest number of parameters.
        max_elements: The largest global number of elements of a parameter.
        choice: Patterns whose matches come first, see :func:`spread_evenly`.
        half: Whether parameters in half precision may be in the sample.
    """
    fitting: dict[str, SampledParameter] = {}
    for labelled in muon_groups(optimizers):
        layouts = labelled.group.get("layouts") or [{}] * len(labelled.group["params"])
        for (name, parameter), layout in zip(labelled.named_parameters(names), layouts, strict=True):
            fits = parameter.ndim >= 2 and 0 < parameter.numel() <= max_elements
            if fits and (half or parameter.dtype not in HALF):
                fitting[name] = SampledParameter(parameter, layout, labelled.group, labelled.place)
    return {name: fitting[name] for name in spread_evenly(list(fitting), sample, choice)}


def spread_evenly(names: list[str], sample: int, choice: NameChoice | None = None) -> list[str]:
    """Choose names from the first to the last; every n-th name would be the same part of each block.

    Args:
        names: The names to choose from.
        sample: The largest number of names.
        choice: All names that match its patterns are chosen, even more than ``sample``; others only if these are fewer.
    """
    chosen = set() if choice is None else choice.by_pattern(names)
    others = [name for name in names if name not in chosen]
    count = max(0, sample - len(chosen))
    places = {round(i * (len(others) - 1) / max(1, count - 1)) for i in range(count)} if others else set()
    chosen |= {others[place] for place in places}
    return [name for name in names if name in chosen]
