"""The state of an optimizer, by the names of its parameters.

In a state dict of torch, parameters are numbers that count through the groups of the optimizer. They are not positions
in ``model.parameters()``: read as such, they give the state to the wrong parameters once the groups have another order.
So the functions here go through the groups, and match parameters by name wherever there are names.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_muon.optim.saved_groups import complete_names, matching_sources
from lightning_muon.strategies.model_state import gather, shard_like

StateDict = dict[str, Any]
"""``{"state": {parameter: {key: value}}, "param_groups": [{"params": [parameter, …], …}]}``."""


def named_state(optimizer: Optimizer, module: nn.Module) -> StateDict:
    """Return the state dict of an optimizer with names in place of numbers.

    Args:
        optimizer: Any optimizer of parameters of ``module``.
        module: The names are those of its ``named_parameters()``.

    Raises:
        ValueError: If the optimizer updates a parameter that the module does not have, or keeps state of a sharded
            parameter in a form that cannot be saved and loaded in shards.
    """
    state_dict = optimizer.state_dict()
    numbers = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    names = dict(zip(numbers, itertools.chain.from_iterable(_names(optimizer, module)), strict=True))
    parameters = dict(module.named_parameters())
    for number, values in state_dict["state"].items():
        _check_sharded(optimizer, names[number], parameters[names[number]], values)
    return _renamed(state_dict, names)


def numbered(named: StateDict) -> StateDict:
    """Return a state dict by names in the form that torch has on one device: numbers that count through the groups."""
    names = itertools.chain.from_iterable(group["params"] for group in named["param_groups"])
    return _renamed(named, {name: number for number, name in enumerate(names)})


def gathered(named: StateDict, *, keep: bool) -> StateDict:
    """Return full tensors, :func:`numbered`, on the ranks that keep them, and nothing on others. A collective."""
    state = {
        name: {key: gather(value, keep=keep) for key, value in values.items()}
        for name, values in named["state"].items()
    }
    return numbered({**named, "state": state}) if keep else {}


def matched(saved: StateDict, optimizer: Optimizer, module: nn.Module) -> StateDict:
    """Return a saved state dict in the form that ``optimizer.load_state_dict`` takes, sharded like the parameters.

    Parameters are matched by name if both the checkpoint and the optimizer have names, else by position in the groups.
    Hyperparameters are taken from the checkpoint. What describes a group, and lists with an entry for each parameter,
    are taken from the optimizer, so its groups may be others than the checkpoint's if there are names.

    Args:
        saved: Its parameters are numbers, as in torch, or names, as in :func:`named_state`. Its tensors are full or
            sharded.
        optimizer: The optimizer; it is not changed.
        module: The module that has the parameters.

    Raises:
        ValueError: If parameters, their algorithms or shapes differ, or the parameters of one group have different
            hyperparameters in the checkpoint; the message names them.
    """
    names = _names(optimizer, module)
    state: dict[int, dict[str, Any]] = {}
    groups = []
    number = 0
    sources = _sources(saved["param_groups"], optimizer, names)
    for group, group_names, (saved_group, keys) in zip(optimizer.param_groups, names, sources, strict=True):
        for name, parameter, key in zip(group_names, group["params"], keys, strict=True):
            if values := saved["state"].get(key):
                state[number] = {what: _laid_out(value, parameter, f"{name}: {what}") for what, value in values.items()}
            number += 1
        groups.append(
            {
                **group,  # for options that the checkpoint does not have
                **saved_group,
                **{key: value for key, value in group.items() if _describes_parameters(value, len(group_names))},
                "params": list(range(number - len(group_names), number)),
            }
        )
    return {"state": state, "param_groups": groups}


def _renamed(state_dict: StateDict, keys: Mapping[Any, Any]) -> StateDict:
    """Return a state dict with other keys for its parameters."""
    return {
        "state": {keys[key]: values for key, values in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": [keys[key] for key in group["params"]]} for group in state_dict["param_groups"]
        ],
    }


def _names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Return the names of the optimizer's parameters in the module, group by group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise ValueError(
                    f"{type(optimizer).__name__}: parameter {position} of group {index}, of shape"
                    f" {tuple(parameter.shape)}, is not one of the module's. Make the optimizer in"
                    " configure_optimizers, which is called after the parameters have been sharded."
                )
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _sources(
    saved_groups: Sequence[dict[str, Any]], optimizer: Optimizer, names: list[list[str]]
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield for each group of the optimizer the saved group, and the saved keys of its parameters in their order."""
    given, own = complete_names(saved_groups), complete_names(optimizer.param_groups)
    sizes, saved_sizes = [len(group) for group in names], [len(group["params"]) for group in saved_groups]
    if all(isinstance(key, str) for group in saved_groups for key in group["params"]):
        saved_names = [group["params"] for group in saved_groups]
        yield from matching_sources(optimizer.param_groups, names, saved_groups, saved_names)
    elif given is not None and own is not None:
        yield from matching_sources(optimizer.param_groups, own, saved_groups, given)
    elif sizes == saved_sizes:
        yield from ((group, group["params"]) for group in saved_groups)
    else:
        raise ValueError(
            f"the optimizer has groups of {sizes} parameters, the checkpoint's of {saved_sizes}, and there are no names"
            " to match them by"
        )


def _laid_out(value: Any, parameter: Tensor, label: str) -> Any:
    """Shard a part of the state like its parameter; scalars and what is no tensor stay as they are."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"{label} has the shape {tuple(value.shape)} in the checkpoint, its parameter {tuple(parameter.shape)}"
        )
    return shard_like(value, parameter)


def _check_sharded(optimizer: Optimizer, name: str, parameter: Tensor, values: Mapping[str, Any]) -> None:
    """Raise a ValueError if a part of the state of a sharded parameter is not sharded like it."""
    for key, value in values.items():
        fits = isinstance(value, DTensor) and value.shape == parameter.shape
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.ndim > 0 and not fits:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key} of {name} in a form that cannot be saved in shards: shape"
                f" {tuple(value.shape)}, {'sharded' if isinstance(value, DTensor) else 'not sharded'}, while the"
                f" parameter is sharded and has {tuple(parameter.shape)}. Make the state with"
                " torch.zeros_like(parameter)."
            )


def _describes_parameters(value: Any, count: int) -> bool:
    """Return whether an entry of a group is a list of names, reasons or layouts, one for each parameter."""
    return isinstance(value, list) and len(value) == count and all(isinstance(entry, (str, dict)) for entry in value)
