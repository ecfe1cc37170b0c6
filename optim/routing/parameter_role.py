"""The role of one parameter, from its place in the model."""

from dataclasses import replace

from lightning_muon.optim.routing.adapters import adapter_role
from lightning_muon.optim.routing.free_parameters import free_role
from lightning_muon.optim.routing.layers import layer_role
from lightning_muon.optim.routing.parametrized import role_in_layer, unparametrized
from lightning_muon.optim.routing.place import Place
from lightning_muon.optim.routing.roles import Role


def role_of(place: Place) -> Role:
    """Find the role of a parameter from its place in the model.

    What adapters train is told first, then the weights of layers by their class, then free parameters by what is beside
    them and by their names. A weight that its layer computes from other parameters gives them its role. A parameter
    with the attribute ``_no_weight_decay``, as the modules of Mamba's authors set it, gets no weight decay.
    """
    in_layer = unparametrized(place)
    role = adapter_role(in_layer) or layer_role(in_layer) or free_role(in_layer)
    if in_layer is not place:
        role = role_in_layer(place, in_layer, role)
    if role.decay and getattr(place.parameter, "_no_weight_decay", False):
        marked = replace(role, reason=f"{role.reason}, marked to have no decay", decay=False)
        return replace(marked, confidence="known") if role.algorithm == "adamw" else marked
    return role
