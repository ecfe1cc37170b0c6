"""The routes that optimizers use, read from their parameter groups."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.optim.routing.routes import Route
from lightning_muon.optim.sharding.sharding import Sharding
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.optim.update.options import algorithm_of

_OF_ROUTES = {"algorithm", "role", "param_names", "reasons"}


def used_routes(optimizers: Iterable[Optimizer]) -> list[Route]:
    """Return the routes of all parameters in groups that :func:`route_parameters` made, and of those it left out.

    Args:
        optimizers: The optimizers of a model, of any class. Groups that were made otherwise are passed over.

    Returns:
        The routes, group by group, then those of parameters that are in no group, as ``"frozen"``. Those of an
        optimizer that updates all groups alike, such as AdamW, have its class as ``optimizer``.
    """
    routes: list[Route] = []
    left_out: dict[Tensor, Route] = {}
    for optimizer in optimizers:
        # MuonAdamW takes these two out of its groups.
        shardings = getattr(optimizer, "_shardings", {})
        left_out |= getattr(optimizer, "_left_out", {})
        for group in optimizer.param_groups:
            if group.keys() >= _OF_ROUTES:
                routes += _routes(group, shardings, _optimizer_of(optimizer, group))
                left_out |= group.get("left_out", {})
    taken = {route.parameter for route in routes}
    return [*routes, *(_unused(route) for parameter, route in left_out.items() if parameter not in taken)]


def _optimizer_of(optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
    updated_by = algorithm_of(optimizer, group)
    return None if updated_by == group["algorithm"] else updated_by


def _routes(group: Mapping[str, Any], shardings: Mapping[Tensor, Sharding], optimizer: str | None) -> Iterator[Route]:
    layouts = group.get("layouts") or [{}] * len(group["params"])
    for name, parameter, reason, layout in zip(
        group["param_names"], group["params"], group["reasons"], layouts, strict=True
    ):
        what = name, parameter, group["algorithm"], group["role"], reason, MatrixLayout(**layout)
        yield Route(*what, sharding=shardings.get(parameter), optimizer=optimizer)


def _unused(route: Route) -> Route:
    if route.algorithm == "frozen":  # by a rule
        return route
    reason = "in no group" if route.parameter.requires_grad else "takes no gradient"
    return replace(route, algorithm="frozen", reason=reason, layout=MatrixLayout(), options={})
