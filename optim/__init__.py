"""The optimizer: Muon for hidden matrices, AdamW for the rest, and which parameter goes to which.

- ``muon_adamw``: ``MuonAdamW``, the optimizer; ``parameter_group``, ``group_step`` and ``state_dict`` are its parts
- ``polar``: polar factors by six methods, ``orthogonalize``
- ``update``: the rules of Muon and AdamW, the update scales, matrix layouts
- ``sharding``: the same on parameters that are distributed over ranks
- ``routing``: ``route_parameters`` and the roles behind it
- ``schedules``: learning rates that torch has only in parts

Each folder imports only those before it in this list. Nothing here imports Lightning.
"""

from lightning_muon.optim.muon_adamw import MuonAdamW
from lightning_muon.optim.polar.orthogonalize import orthogonalize
from lightning_muon.optim.routing.routes import Route, Rule
from lightning_muon.optim.routing.routing import find_routes, route_parameters, routing_table
from lightning_muon.optim.schedules import OneCycle, WarmupCosine, WarmupStableDecay
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.optim.update.scale import scale_factor

__all__ = [
    "MatrixLayout",
    "MuonAdamW",
    "OneCycle",
    "Route",
    "Rule",
    "WarmupCosine",
    "WarmupStableDecay",
    "find_routes",
    "orthogonalize",
    "route_parameters",
    "routing_table",
    "scale_factor",
]
