"""The state of an optimizer by the names of its parameters, and how it finds its way back to them.

torch numbers the parameters through the groups of the optimizer, and a state dict holds these numbers. Whoever takes
them for positions in ``model.parameters()`` gives the state to the wrong parameters as soon as the groups have another
order. So here everything goes through the groups, by name wherever there are names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_muon.strategies.shard import gather, shard_like

StateDict = dict[str, Any]
"""``{"state": {parameter: {key: value}}, "param_groups": [{"params": [parameter, …], …}]}``."""


def named_state(optimizer: Optimizer, module: nn.Module) -> StateDict:
    """The state dict of an optimizer, with the names of its parameters in place of their numbers.

    Args:
        optimizer: Any optimizer of parameters of ``module``.
        module: Gives the names, as ``named_parameters()`` has them.

    Raises:
        ValueError: If the optimizer updates a parameter that the module does not have, or keeps state of a sharded
            parameter that could not be saved and loaded again.
    """
    state_dict = optimizer.state_dict()
    names = {
        number: name
        for saved, live in zip(_numbers(state_dict), _names(optimizer, module), strict=True)
        for number, name in zip(saved, live, strict=True)
    }
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = {names[number]: values for number, values in state_dict["state"].items()}
    for name, values in state.items():
        _check_layout(optimizer, name, parameters[name], values)
    groups = [
        {**group, "params": [names[number] for number in group["params"]]} for group in state_dict["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def numbered(named: StateDict) -> StateDict:
    """The state dict as torch has it on one device: parameters numbered through the groups."""
    numbers = {
        name: number for number, name in enumerate(name for group in named["param_groups"] for name in group["params"])
    }
    return {
        "state": {numbers[name]: values for name, values in named["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]
        ],
    }


def gathered(named: StateDict, *, keep: bool) -> StateDict:
    """The state dict with whole tensors, on the ranks that keep it. A collective."""
    state = {
        name: {key: gather(value, keep=keep) for key, value in values.items()}
        for name, values in named["state"].items()
    }
    return {**named, "state": state} if keep else {}


def matched(saved: StateDict, optimizer: Optimizer, module: nn.Module) -> StateDict:
    """Fit a saved state dict to an optimizer: what its ``load_state_dict`` takes, each tensor sharded as its parameter.

    Parameters are found by name where the checkpoint and the optimizer have names, else by their position in the
    groups. Hyperparameters are the checkpoint's; what a group says about each parameter is the optimizer's.

    Args:
        saved: Parameters numbered, as torch does, or named, as :func:`named_state` does; tensors whole or sharded.
        optimizer: It remains as it is.
        module: Gives the names of the parameters.

    Raises:
        ValueError: If parameters, groups or shapes differ, with their names.
    """
    sources = _sources(saved, optimizer, module)
    state: dict[int, dict[str, Any]] = {}
    groups = []
    number = 0
    for group, names, source in zip(optimizer.param_groups, _names(optimizer, module), sources, strict=True):
        saved_group, keys = source
        for name, parameter, key in zip(names, group["params"], keys, strict=True):
            if values := saved["state"].get(key):
                state[number] = {what: _laid_out(value, parameter, f"{name}: {what}") for what, value in values.items()}
            number += 1
        groups.append(
            {
                **group,  # for what the checkpoint does not say
                **saved_group,
                **{key: value for key, value in group.items() if _describes_parameters(value, len(names))},
                "params": list(range(number - len(names), number)),
            }
        )
    return {"state": state, "param_groups": groups}


def _numbers(state_dict: StateDict) -> list[list[Any]]:
    return [list(group["params"]) for group in state_dict["param_groups"]]


def _names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """The names of the optimizer's parameters, group by group."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise ValueError(
                    f"{type(optimizer).__name__}: parameter {position} of group {index}, of shape"
                    f" {tuple(parameter.shape)}, is not one of the module's. Make the optimizer in"
                    " configure_optimizers, which is called after the parameters have been sharded."
                )
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _sources(saved: StateDict, optimizer: Optimizer, module: nn.Module) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """For each group of the optimizer, the saved group, and the saved keys of its parameters in their order."""
    saved_groups = saved["param_groups"]
    theirs = [_saved_names(group) for group in saved_groups]
    if any(names is None for names in theirs):
        ours: list[list[str]] | None = None
    elif all(isinstance(key, str) for keys in _numbers(saved) for key in keys):
        ours = _names(optimizer, module)
    else:
        ours = _given_names(optimizer)
    if ours is None:
        return _by_position(saved_groups, _names(optimizer, module))
    return _by_name(saved_groups, [names or [] for names in theirs], ours)


def _by_name(
    saved_groups: Sequence[dict[str, Any]], theirs: Sequence[Sequence[str]], ours: Sequence[Sequence[str]]
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    missing, left_over = ({*_flat(ours)} - {*_flat(theirs)}), ({*_flat(theirs)} - {*_flat(ours)})
    if missing or left_over:
        raise ValueError(
            "the optimizer and the checkpoint's update different parameters:"
            f" {_only('the optimizer', missing)}{_only('the checkpoint', left_over)}"
        )
    by_names = {frozenset(names): (group, names) for group, names in zip(saved_groups, theirs, strict=True)}
    for names in ours:
        if frozenset(names) not in by_names:
            raise ValueError(
                f"the checkpoint's optimizer has no group of exactly {', '.join(names)}: its parameters are grouped"
                " otherwise. Route them as they were routed when it was saved."
            )
        group, saved_names = by_names[frozenset(names)]
        keys = dict(zip(saved_names, group["params"], strict=True))
        yield group, [keys[name] for name in names]


def _by_position(
    saved_groups: Sequence[dict[str, Any]], ours: Sequence[Sequence[str]]
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    sizes, saved_sizes = [len(names) for names in ours], [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the optimizer has groups of {sizes} parameters, the checkpoint's of {saved_sizes}, without names by"
            " which they could be told apart"
        )
    for group in saved_groups:
        yield group, list(group["params"])


def _saved_names(group: Mapping[str, Any]) -> list[str] | None:
    if all(isinstance(key, str) for key in group["params"]):
        return list(group["params"])
    names = group.get("param_names")
    return list(names) if names is not None and len(names) == len(group["params"]) else None


def _given_names(optimizer: Optimizer) -> list[list[str]] | None:
    groups = optimizer.param_groups
    return [list(group["param_names"]) for group in groups] if all("param_names" in group for group in groups) else None


def _laid_out(value: Any, parameter: Tensor, label: str) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"{label} has the shape {tuple(value.shape)} in the checkpoint, its parameter {tuple(parameter.shape)}"
        )
    return shard_like(value, parameter)


def _check_layout(optimizer: Optimizer, name: str, parameter: Tensor, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.ndim == 0:
            continue
        if value.shape != parameter.shape or not isinstance(value, DTensor):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key} of {name} in a form that cannot be saved in shards: shape"
                f" {tuple(value.shape)}, {'sharded' if isinstance(value, DTensor) else 'not sharded'}, where the"
                f" parameter is sharded and has {tuple(parameter.shape)}. State made with torch.zeros_like(parameter)"
                " can be."
            )


def _describes_parameters(value: Any, count: int) -> bool:
    """Whether an entry of a group is a list of names, reasons and the like, one for each parameter."""
    return isinstance(value, list) and len(value) == count and all(isinstance(entry, (str, dict)) for entry in value)


def _flat(names: Sequence[Sequence[str]]) -> list[str]:
    return [name for group in names for name in group]


def _only(where: str, names: set[str]) -> str:
    return f" only {where} has {', '.join(sorted(names))};" if names else ""
