"""The routes that the parameter groups of an optimizer were made from."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lightning_muon.optim.routing.routing import Route
from lightning_muon.optim.update.matrix_layout import MatrixLayout


def routes_of_groups(groups: Iterable[Mapping[str, Any]]) -> list[Route]:
    """Return the routes of all parameters in groups that :func:`route_parameters` made, and of those it left out.

    Args:
        groups: Parameter groups of one optimizer or several, of any class; those made otherwise are passed over.

    Returns:
        The routes, group by group, then those of parameters that are in no group, as ``"frozen"``.
    """
    routed = [group for group in groups if "algorithm" in group and "reasons" in group]
    routes = [route for group in routed for route in _routes(group)]
    taken = {id(route.parameter) for route in routes}
    for group in routed:
        for route in group.get("left_out", {}).values():
            if id(route.parameter) not in taken:
                taken.add(id(route.parameter))
                reason = "in no group" if route.parameter.requires_grad else "takes no gradient"
                was_frozen = route.algorithm == "frozen"  # by a rule
                routes.append(route if was_frozen else replace(route, algorithm="frozen", reason=reason))
    return routes


def _routes(group: Mapping[str, Any]) -> Iterable[Route]:
    count = len(group["params"])
    layouts = group.get("layouts") or [{}] * count
    shardings = group.get("shardings") or [None] * count
    columns = (group["param_names"], group["params"], group["reasons"], layouts, shardings)
    for name, parameter, reason, layout, sharding in zip(*columns, strict=True):
        yield Route(
            name, parameter, group["algorithm"], group["role"], reason, MatrixLayout(**layout), sharding=sharding
        )
