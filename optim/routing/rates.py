"""Learning rates of the roles, whatever optimizer takes the groups."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightning_muon.optim.routing.roles import ROLES
from lightning_muon.optim.routing.routes import Route
from lightning_muon.optim.update.options import check_number


def with_rates(routes: Iterable[Route], lr_by_role: Mapping[str, float]) -> list[Route]:
    """Return routes with the learning rate of their role among their options, where they have none of their own.

    What is frozen has it too: it counts when it is trained later. Rates of which none counts are warned of.

    Raises:
        ValueError: If a role is unknown, or its rate is not a number of at least zero.
    """
    for role, lr in lr_by_role.items():
        if role not in ROLES:
            raise ValueError(f"lr_by_role has the unknown role {role!r}; roles are {', '.join(ROLES)}")
        check_number("lr_by_role", role, lr, 0.0)
    rated = [_with_rate(route, lr_by_role) for route in routes]
    found = [role for role in ROLES if any(route.role == role for route in rated)]
    if lr_by_role and not lr_by_role.keys() & set(found):
        warnings.warn(
            f"lr_by_role has no effect: no parameter is {' or '.join(lr_by_role)}."
            f" Roles of the model: {', '.join(found)}.",
            stacklevel=3,
        )
    return rated


def _with_rate(route: Route, lr_by_role: Mapping[str, float]) -> Route:
    options = {"lr": lr_by_role[route.role], **route.options} if route.role in lr_by_role else route.options
    trained = None if route.trained is None else _with_rate(route.trained, lr_by_role)
    return replace(route, options=options, trained=trained)
