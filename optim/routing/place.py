"""Where a parameter is in its model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor, nn

# Names that peft gives to the layer that it adapts, and to the copies of a module that it trains: they say nothing of
# the layer. https://github.com/huggingface/peft/blob/main/src/peft/tuners/tuners_utils.py
_ADAPTED = frozenset({"base_layer", "original_module", "modules_to_save"})


@dataclass(frozen=True)
class Place:
    """The place of a parameter: its owner and the modules around it.

    Args:
        owner: The module that owns the parameter.
        path: The owner's name in the model without wrappers, such as ``"blocks.3.attention"``.
        name: The parameter's name in its owner, such as ``"weight"``.
        parameter: The parameter.
        around: The modules around the owner, the nearest first, up to the model.
    """

    owner: nn.Module
    path: str
    name: str
    parameter: Tensor
    around: tuple[nn.Module, ...] = ()

    @property
    def kind(self) -> str:
        """The class of the owner, which has another name while a weight of it is parametrized."""
        name = type(self.owner).__name__
        return name.removeprefix("Parametrized") if hasattr(self.owner, "parametrizations") else name

    @property
    def names(self) -> list[str]:
        """The own name of the owner, then those of the modules around it; the model has none."""
        return list(reversed(self.path.split("."))) if self.path else []

    @property
    def stem(self) -> str:
        """The name of the parameter without ``_weight`` or ``_kernel``."""
        return re.sub(r"_(weight|kernel)$", "", self.name)

    def steps(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the names from the parameter outwards, each with the module that contains what it names."""
        yield from zip([self.name, *self.names], [self.owner, *self.around], strict=False)

    def as_projection(self) -> Iterator[tuple[str, nn.Module | None]]:
        """Yield the names that say what a layer is for, each with the module in which it has this name.

        The first is the owner's name. Where the module around contains no other matrix, as a convolution with its norm
        or a layer with dropout behind it, the name of that module says it as well: ``"qkv"`` of ``"qkv.linear"``. So
        does that of a list of such layers, and of a module that contains nothing else, as where each type of node in a
        graph has a layer of its own.
        """
        names, around = self.names, self.around
        if not names:
            yield "", None
        for index, name in enumerate(names):
            yield name, around[index] if index < len(around) else None
            if index >= len(around):
                break
            in_list = isinstance(around[index], nn.ModuleList | nn.ModuleDict)
            is_alone = index > 0 and len(list(around[index].children())) == 1
            if not (in_list or is_alone or name in _ADAPTED or _contains_one_matrix(around[index])):
                break

    def in_list(self) -> "Place":
        """Return the place of the list or dictionary of parameters that contains this one, else this place."""
        place = self
        while isinstance(place.owner, nn.ParameterList | nn.ParameterDict) and place.around:
            path, _, name = place.path.rpartition(".")
            place = replace(place, owner=place.around[0], path=path, name=name, around=place.around[1:])
        return place


def is_vector(parameter: Tensor) -> bool:
    """Return whether all elements are along one dimension, as in (out, 1), (1, 1, d) or (d,)."""
    return parameter.ndim < 2 or parameter.numel() == max(parameter.shape)


def _contains_one_matrix(module: nn.Module) -> bool:
    matrices = (parameter for parameter in module.parameters() if not is_vector(parameter))
    return len(list(islice(matrices, 2))) < 2
