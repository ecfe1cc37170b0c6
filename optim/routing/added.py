"""Parameter groups that are added to an optimizer after the rest of the model was routed."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_muon.optim.routing.routes import Route
from lightning_muon.optim.routing.routing import grouped

# What describes the parameters of a group: routing knows better.
_DESCRIPTION = {"params", "param_names"}


def route_added(
    group: Mapping[str, Any], left_out: Mapping[Tensor, Route], names: Iterable[str]
) -> list[dict[str, Any]] | None:
    """Return groups by algorithm and role for a group of plain parameters that were left out when the rest was routed.

    Args:
        group: ``params``, and options, which all of them get: ``{"params": […], "lr": 0.001}``.
        left_out: The routes of what was left out.
        names: The names of the optimizer's groups, which the new ones are not to have.

    Returns:
        ``None`` if the route of a parameter is not known.
    """
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    if not params or any(param not in left_out for param in params):
        return None
    routes = [left_out[param] for param in params]
    if frozen := [route.name for route in routes if route.algorithm == "frozen"]:
        warnings.warn(f"{', '.join(frozen)} stay frozen, although they are added: a rule says so", stacklevel=4)
    options = {key: value for key, value in group.items() if key not in _DESCRIPTION}
    return grouped([route for route in routes if route.algorithm != "frozen"], options, names)
