"""What updates the weights: a hybrid Muon/AdamW optimizer, and which parameter goes where."""

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.muon_adamw import MuonAdamW
from lightning_muon.optim.orthogonalize import orthogonalize
from lightning_muon.optim.routing import Route, Rule, find_routes, route_parameters, routing_table
from lightning_muon.optim.update_scale import scale_factor

__all__ = [
    "MatrixLayout",
    "MuonAdamW",
    "Route",
    "Rule",
    "find_routes",
    "orthogonalize",
    "route_parameters",
    "routing_table",
    "scale_factor",
]
