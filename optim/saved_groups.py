"""Saved parameter groups, matched by the names of parameters to an optimizer that groups them otherwise.

A state dict of torch matches groups and parameters by position. So a run that routes its parameters into other groups,
by a rule or by another version of ``route_parameters``, could not go on from it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from lightning_muon.optim.parameter_group import group_label

Groups = Sequence[Mapping[str, Any]]

# What describes a group and its parameters, and is always the optimizer's own. All else is taken from the saved group.
_DESCRIPTION = (
    "params",
    "param_names",
    "name",
    "algorithm",
    "role",
    "reasons",
    "layouts",
    "shardings",
    "added",
    "momentum_dtype",
)


class Source(NamedTuple):
    """Where a group of an optimizer comes from.

    Args:
        group: The group to load, without ``params``: saved hyperparameters, and the optimizer's description.
        keys: The saved keys of its parameters, in the optimizer's order.
    """

    group: dict[str, Any]
    keys: list[Any]


def complete_names(groups: Groups) -> list[list[str]] | None:
    """Return the ``param_names`` of groups; ``None`` if a parameter has none, or two have the same."""
    names = [list(group.get("param_names") or ()) for group in groups]
    sizes = [len(group["params"]) for group in groups]
    distinct = len({*chain.from_iterable(names)}) == sum(sizes)
    return names if distinct and [len(of_group) for of_group in names] == sizes else None


def regrouped(groups: Groups, state_dict: Mapping[str, Any], saved_names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return a state dict in the groups of an optimizer, numbered through them as torch does.

    Args:
        groups: The optimizer's groups, with :func:`complete_names`.
        state_dict: In other groups; it is not changed.
        saved_names: The names of its parameters, group by group.

    Raises:
        ValueError: See :func:`matching_sources`.
    """
    names = [group["param_names"] for group in groups]
    state: dict[Any, Any] = {}
    loaded: list[dict[str, Any]] = []
    for source in matching_sources(groups, names, state_dict["param_groups"], saved_names):
        first = sum(len(group["params"]) for group in loaded)
        numbers = list(range(first, first + len(source.keys)))
        state |= {
            n: state_dict["state"][key]
            for n, key in zip(numbers, source.keys, strict=True)
            if key in state_dict["state"]
        }
        loaded.append({**source.group, "params": numbers})
    return {**state_dict, "state": state, "param_groups": loaded}


def matching_sources(
    groups: Groups, names: Sequence[Sequence[str]], saved_groups: Groups, saved_names: Sequence[Sequence[str]]
) -> Iterator[Source]:
    """Yield for each group of an optimizer what to load into it.

    Args:
        groups: The optimizer's groups.
        names: The names of their parameters, group by group, each once.
        saved_groups: The groups of a state dict.
        saved_names: The names of their parameters, in the order of ``params``, by which both are matched.

    Raises:
        ValueError: If the names differ, or the algorithm of a parameter; or if the parameters of one group have
            different hyperparameters in the state dict.
    """
    _check_same_names(set(chain.from_iterable(names)), set(chain.from_iterable(saved_names)))
    places = {name: place for place, of_group in enumerate(saved_names) for name in of_group}
    keys = {
        name: key
        for of_group, group in zip(saved_names, saved_groups, strict=True)
        for name, key in zip(of_group, group["params"], strict=True)
    }
    for index, (group, of_group) in enumerate(zip(groups, names, strict=True)):
        label = group_label(group, index)
        origins: dict[int, str] = {}  # with the first parameter of each
        for name in of_group:
            origins.setdefault(places[name], name)
        for place, name in origins.items():
            _check_algorithm(label, name, group.get("algorithm"), saved_groups[place].get("algorithm"))
        options = [(name, _options(saved_groups[place])) for place, name in origins.items()]
        for name, other in options[1:]:
            _check_equal(label, options[0], (name, other))
        description = {key: group[key] for key in _DESCRIPTION[1:] if key in group}
        # An empty group has no origin: it keeps what it has.
        yield Source(
            {**(options[0][1] if options else _options(group)), **description}, [keys[name] for name in of_group]
        )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _DESCRIPTION}


def _check_same_names(own: set[str], saved: set[str]) -> None:
    if own != saved:
        only = "".join(
            f" only {where} has {', '.join(sorted(names)[:3])}{' and more' if len(names) > 3 else ''};"
            for where, names in (("the optimizer", own - saved), ("the checkpoint", saved - own))
            if names
        )
        raise ValueError(
            f"the optimizer and the checkpoint's update different parameters:{only} route them as in the run that saved"
            " it"
        )


def _check_algorithm(label: str, name: str, own: Any, saved: Any) -> None:
    if own != saved and None not in {own, saved}:
        raise ValueError(
            f"{label}: the algorithm of {name} is {saved!r} in the checkpoint and {own!r} in this optimizer:"
            " route it as in the run that saved it"
        )


def _check_equal(label: str, first: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]) -> None:
    """Raise a ValueError if the hyperparameters of two saved groups differ; each comes with the name of a parameter."""
    (name, options), (other_name, others) = first, other
    for key in sorted(options.keys() | others.keys()):
        mine, theirs = options.get(key), others.get(key)
        equal = mine.equal(theirs) if isinstance(mine, Tensor) and isinstance(theirs, Tensor) else mine == theirs
        if not equal:
            raise ValueError(
                f"{label}: {key} is {mine!r} for {name} in the checkpoint and {theirs!r} for {other_name}: route them"
                " into groups of their own, as in the run that saved it"
            )
