"""Weights that a layer computes from other parameters: weight norm, spectral norm, pruning, orthogonal matrices."""

import re
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from lightning_muon.optim.routing.place import Place, is_vector
from lightning_muon.optim.routing.roles import Role, unknown, vector

# What the functions of torch.nn.utils that came before torch.nn.utils.parametrize make of a parameter: magnitude and
# direction of weight_norm; the weight of spectral_norm, and of torch.nn.utils.prune.
_OLD_NAME = re.compile(r"_(g|v|orig)$")
# The parameter has the geometry of the weight: the weight is the parameter, but for its magnitude.
_RESCALED = frozenset({"_WeightNorm", "_SpectralNorm"})


def unparametrized(place: Place) -> Place:
    """Return the place that the weight would have in its layer, if the layer computes it from this parameter.

    Return the place as it is for others. The result of ``"conv.parametrizations.weight.original1"`` or of
    ``"conv.weight_v"`` is that of ``"conv.weight"``, with the parameter itself.
    """
    if isinstance(place.owner, ParametrizationList) and len(place.around) > 1:
        path, _, name = place.path.rpartition(".")
        path = path.rpartition(".")[0]
        return replace(place, owner=place.around[1], path=path, name=name, around=place.around[2:])
    base = _OLD_NAME.sub("", place.name)
    if base != place.name and _has_hook(place.owner, base):
        return replace(place, name=base)
    return place


def role_in_layer(place: Place, in_layer: Place, role: Role) -> Role:
    """Return the role of a parameter from which a layer computes its weight.

    Args:
        place: Where the parameter is.
        in_layer: The place of the weight, see :func:`unparametrized`.
        role: The role that the weight would have.
    """
    by = ""
    if isinstance(place.owner, ParametrizationList):
        kinds = [type(module).__name__ for module in place.owner]
        magnitude = kinds == ["_WeightNorm"] and place.name == "original0"
        by = "" if set(kinds) <= _RESCALED else f" by {', '.join(kinds)}"
    else:
        magnitude = place.name.endswith("_g")
    if magnitude:
        return vector("vector, magnitudes of a parametrized weight")
    if is_vector(place.parameter):
        return role if role.is_layer and _fits(in_layer.owner, place.parameter) else vector()
    if not _fits(in_layer.owner, place.parameter):
        return unknown(f"{place.parameter.ndim}-D parameter of a weight that {by.strip()} gives")
    confidence = "by name" if by and role.confidence == "known" else role.confidence
    return replace(role, reason=f"{role.reason}, parametrized{by}", confidence=confidence)


def _has_hook(owner: nn.Module, name: str) -> bool:
    """Return whether a hook of the module computes the tensor of this name before each forward."""
    hooks = owner._forward_pre_hooks.values()
    return any(name in {getattr(hook, "name", None), getattr(hook, "_tensor_name", None)} for hook in hooks)


def _fits(layer: nn.Module, parameter: Tensor) -> bool:
    """Return whether a parameter has the shape of the weight, as far as the layer says it."""
    if isinstance(layer, nn.Linear):
        return tuple(parameter.shape) == (layer.out_features, layer.in_features)
    return parameter.ndim == 2 + len(layer.kernel_size) if isinstance(layer, _ConvNd) else True
