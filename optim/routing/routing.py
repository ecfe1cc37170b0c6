"""Routes: which algorithm updates which parameter, and why; the parameter groups and the table made from them."""

import difflib
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_muon.optim.routing.guesses import about_guesses
from lightning_muon.optim.routing.model_roles import model_roles
from lightning_muon.optim.routing.rates import with_rates
from lightning_muon.optim.routing.roles import MUON_ROLES, ROLES, Role
from lightning_muon.optim.routing.routes import ORDER, LeftOut, Route, Rule
from lightning_muon.optim.routing.wrapped_names import plain_name
from lightning_muon.optim.sharding.sharding import Shardings
from lightning_muon.optim.sharding.wrappers import find_ddp, find_shardings, full_shapes, without_ddp
from lightning_muon.optim.update.matrix_layout import MatrixLayout

if TYPE_CHECKING:
    from rich.table import Table


def route_parameters(
    module: nn.Module,
    rules: Iterable[Rule] = (),
    *,
    part: nn.Module | None = None,
    per_head: bool = False,
    strict: bool = False,
    lr_by_role: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Sort the parameters of a model into groups for :class:`~lightning_muon.optim.MuonAdamW`.

    Muon updates hidden matrices: of linear layers, convolutions (as out × in·kernel), recurrent layers, stacks of
    experts and fused projections (each block by itself). AdamW updates embeddings, output heads and weights tied to
    them, norms, biases and other vectors; vectors without weight decay. AdamW also updates the factors of LoRA and what
    other adapters train, unless a rule says otherwise, such as ``Rule("*.lora_[AB].*", "muon")``. Each role has a group
    of its own, and may have a learning rate of its own with any optimizer: ``lr_by_role``. Complex parameters go to
    AdamW.

    Frozen parameters are left out, and are not updated even if they are unfrozen later, so freeze before routing. To
    unfreeze a part during training, add its parameters, as Lightning's ``BackboneFinetuning`` does::

        self.make_trainable(pl_module.backbone)
        optimizer.add_param_group({"params": list(pl_module.backbone.parameters()), "lr": 1e-4})

    ``MuonAdamW`` remembers their roles and makes groups of them as it is done here. To see or change these, route the
    part, and add each group: ``route_parameters(pl_module, part=pl_module.backbone)``.

    Args:
        module: The model, before or after ``torch.compile``; if DDP or FSDP wrap it, after that.
        rules: Exceptions. The first rule that matches a parameter overrides its role.
        part: A module in the model: only its parameters are returned, with their roles in the whole model. Its name in
            the model is appended to the names of the groups.
        per_head: Let Muon orthogonalize each head of attention by itself: its outputs of the projections of query, key
            and value, and its inputs of the output projection. The attention modules or their ``config`` say the
            numbers of heads; where none does, the reason says so, and a rule may, with
            ``MatrixLayout(blocks=heads)``.
        strict: Refuse to guess. Otherwise one warning lists the guesses, with rules that settle them.
        lr_by_role: Learning rates of roles, such as ``{"embedding": 0.3, "head": 0.008}``, in place of the optimizer's.
            An ``lr`` in the options of a rule overrides it. Groups that are added later follow it too.

    Returns:
        One group per algorithm, role and set of options, with ``params``; ``param_names``, ``reasons`` and, for Muon,
        ``layouts`` in the order of these; ``algorithm``; ``role``; ``name``, which Lightning's
        ``LearningRateMonitor`` shows. The name is that of the role: ``matrix``, ``router``, ``embedding``, ``head``,
        ``adapter``, ``vector`` or ``other``; with the algorithm, as in ``head_muon``, where a rule chose another than
        the role's.
        Muon's groups come first, and the roles in this order. Under DDP and FSDP1 also ``shardings``, and in the first
        group ``left_out``, if parameters are: only the optimizer reads these, and they are empty in copies and
        checkpoints.
        Any ``torch.optim`` optimizer takes the groups.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If a rule matches nothing, contradicts a shape, or names an unknown algorithm; if no parameter
            requires a gradient; if the part is not in the model; if ``strict``, and a role is a guess; or if
            ``lr_by_role`` has an unknown role or a wrong rate.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"route_parameters takes the module, not its parameters; got {type(module).__name__}")
    suffix = "" if part is None else f"_{_path_in(without_ddp(module), part)}"
    of_part = {id(parameter) for parameter in (module if part is None else part).parameters()}
    routes = find_routes(module, rules, per_head=per_head, strict=strict)
    if lr_by_role:
        routes = with_rates(routes, lr_by_role)
    trained = [route for route in routes if route.algorithm != "frozen" and id(route.parameter) in of_part]
    if not trained:
        raise ValueError(
            f"{type(part or module).__name__} has no parameter that requires a gradient: there is nothing to train"
        )
    groups = grouped(trained, suffix=suffix)
    taken = {id(route.parameter) for route in trained}
    if others := [route for route in routes if id(route.parameter) not in taken]:
        left_out = ((route.parameter, route.trained or route) for route in others)
        groups[0]["left_out"] = LeftOut(left_out, find_ddp(module))
    return groups


def grouped(
    routes: Iterable[Route], options: Mapping[str, Any] | None = None, names: Iterable[str] = (), suffix: str = ""
) -> list[dict[str, Any]]:
    """Return the groups of routes, of which none is frozen; see :func:`route_parameters`.

    Args:
        routes: The routes.
        options: Further options of all groups, which override those of the routes.
        names: Names that no group is to have.
        suffix: The end of the names.
    """
    members: defaultdict[tuple[int, int, str], list[Route]] = defaultdict(list)
    for route in routes:
        algorithm, role = ORDER.index(route.algorithm), ROLES.index(route.role)
        members[algorithm, role, repr(sorted(route.options.items()))].append(route)
    # Groups that differ in their options alone come in the order of their first parameters.
    ordered = sorted(members.items(), key=lambda item: item[0][:2])
    groups = [{**_group(of_one), **(options or {})} for _, of_one in ordered]
    _name(groups, suffix, set(names))
    return groups


def routing_table(routes: Iterable[Route], *, every_parameter: bool = False) -> "Table":
    """Return routes from :func:`find_routes` as a table for ``rich.print``.

    It has one row for each reason or, with ``every_parameter``, for each parameter.
    """
    from rich.table import Table  # noqa: PLC0415 - only the table needs rich

    rows: defaultdict[tuple[int, int, str, str, str], list[Route]] = defaultdict(list)
    for route in routes:
        name = route.name if every_parameter else ""
        algorithm, role = ORDER.index(route.algorithm), ROLES.index(route.role)
        rows[algorithm, role, route.updated_by, route.reason, name].append(route)
    table = Table(title="Who updates what", title_justify="left")
    for title in ("updated by", "role", "reason", "parameter" if every_parameter else "parameters"):
        table.add_column(title)
    table.add_column("shape" if every_parameter else "elements", justify="right")
    for (_, role, updated_by, reason, _), members in sorted(rows.items(), key=lambda row: row[0][:2]):
        first = members[0]
        what = first.name if len(members) == 1 else f"{len(members)}, such as {first.name}"
        elements = f"{sum(route.shape.numel() for route in members):,}"
        size = "×".join(map(str, first.shape)) if every_parameter else elements
        table.add_row(updated_by, ROLES[role], reason, what, size)
    return table


def find_routes(
    module: nn.Module, rules: Iterable[Rule] = (), *, per_head: bool = False, strict: bool = False
) -> list[Route]:
    """Find the route of each parameter of a model, in the order of ``named_parameters()``.

    Arguments and errors are those of :func:`route_parameters`.
    """
    rules = list(rules)
    routes: list[Route] = []
    used: set[int] = set()
    shardings, model = find_shardings(module), without_ddp(module)
    with full_shapes(model, shardings) as own:
        for names, parameter, role in model_roles(model, per_head=per_head):
            matching = (i for i, rule in enumerate(rules) if any(fnmatchcase(name, rule.pattern) for name in names))
            if (first := next(matching, None)) is not None:
                used.add(first)
                route = _route_by_rule(names[0], parameter, role, rules[first])
            else:
                route = _route_by_role(names[0], parameter, role)
            original = own.get(id(parameter), parameter)
            route = replace(route, parameter=original, sharding=shardings.get(original))
            if not parameter.requires_grad:
                trained = route if route.algorithm != "frozen" else None
                idle: dict[str, Any] = {"algorithm": "frozen", "layout": MatrixLayout(), "options": {}}
                route = replace(route, **idle, reason="takes no gradient", trained=trained) if trained else route
            routes.append(route)
    for index, rule in enumerate(rules):
        if index not in used:
            _raise_unused(rule, [route.name for route in routes])
    if guesses := about_guesses(routes):
        if strict:
            raise ValueError(f"strict routing: {guesses}")
        warnings.warn(guesses, stacklevel=3)
    return routes


def _route_by_role(name: str, parameter: nn.Parameter, role: Role) -> Route:
    options = {} if role.decay else {"weight_decay": 0.0}
    if parameter.is_complex():
        return Route(name, parameter, "adamw", role.name, f"complex: {role.reason}", options=options)
    return Route(name, parameter, role.algorithm, role.name, role.reason, role.layout, options, role.confidence)


def _route_by_rule(name: str, parameter: nn.Parameter, role: Role, rule: Rule) -> Route:
    if rule.algorithm not in ORDER:
        raise ValueError(f"rule {rule.pattern!r}: algorithm is {rule.algorithm!r}, choose one of {', '.join(ORDER)}")
    if rule.algorithm == "frozen":
        if rule.options:
            raise ValueError(f"rule {rule.pattern!r}: what is frozen has no use for the options {rule.options}")
        return Route(name, parameter, "frozen", role.name, f"rule {rule.pattern!r}")
    layout = rule.layout or role.layout
    if rule.algorithm == "muon":
        if parameter.is_complex():
            raise ValueError(
                f"rule {rule.pattern!r} sends {name} to muon: it is {parameter.dtype}, and Muon updates real matrices."
                " Route it to adamw."
            )
        try:
            layout.check(parameter.shape)
        except ValueError as error:
            raise ValueError(f"rule {rule.pattern!r} sends {name} to muon: {error}") from None
    route = _route_by_role(name, parameter, replace(role, algorithm=rule.algorithm, layout=layout))
    options = {**(route.options if rule.algorithm == "adamw" else {}), **rule.options}
    return replace(route, reason=f"rule {rule.pattern!r}", options=options, confidence="known")


def _raise_unused(rule: Rule, names: Sequence[str]) -> None:
    if any(fnmatchcase(name, rule.pattern) for name in names):
        raise ValueError(f"rule {rule.pattern!r} has no effect: earlier rules take all the parameters that it matches")
    near = difflib.get_close_matches(rule.pattern.replace("*", ""), names, n=3, cutoff=0.3) or list(names[:3])
    raise ValueError(f"rule {rule.pattern!r} matches no parameter; there are, for instance, {', '.join(near)}")


def _group(routes: Sequence[Route]) -> dict[str, Any]:
    group: dict[str, Any] = {
        "params": [route.parameter for route in routes],
        "param_names": [route.name for route in routes],
        "reasons": [route.reason for route in routes],
        "algorithm": routes[0].algorithm,
        "role": routes[0].role,
        **routes[0].options,
    }
    if routes[0].algorithm == "muon":
        group["layouts"] = [asdict(route.layout) for route in routes]
    if any(route.sharding is not None for route in routes):
        group["shardings"] = Shardings(route.sharding for route in routes)
    return group


def _path_in(module: nn.Module, part: nn.Module) -> str:
    for path, candidate in module.named_modules():
        if candidate is part:
            return plain_name(path)
    raise ValueError(f"part is a {type(part).__name__} that is not in the {type(module).__name__} that is routed")


def _name(groups: Sequence[dict[str, Any]], suffix: str, taken: set[str]) -> None:
    """Name the groups by role and suffix, with a number where two would have the same name, or it is taken."""
    for group in groups:
        usual = "muon" if group["role"] in MUON_ROLES else "adamw"
        own = group["role"] if group["algorithm"] == usual else f"{group['role']}_{group['algorithm']}"
        name = str(group.get("name", own)) + suffix
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        group["name"] = name if name not in taken else next(n for n in numbered if n not in taken)
        taken.add(group["name"])
