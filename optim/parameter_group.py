"""What a parameter group of MuonAdamW holds, and the errors that say when it does not."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.orthogonalize import orthogonalize
from lightning_muon.optim.update_scale import scale_factor

Algorithm = Literal["muon", "adamw"]
ALGORITHMS = get_args(Algorithm)

# What routing and the schedulers of torch write into a group beside the hyperparameters.
_BOOKKEEPING = {"params", "param_names", "name", "algorithm", "layouts", "reasons"}
_SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


def matrix_layouts(group: Mapping[str, Any]) -> list[MatrixLayout]:
    """Return where the matrices of each parameter are: plain ones, if the group does not say."""
    if "layouts" not in group:
        return [MatrixLayout()] * len(group["params"])
    return [MatrixLayout(**layout) for layout in group["layouts"]]


def group_label(group: Any, index: int) -> str:
    """Return what to call a group in a message."""
    name = group.get("name") if isinstance(group, dict) else None
    return f"parameter group {index} ({name})" if name else f"parameter group {index}"


def named(group: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the group with ``param_names``, made up from its label where it brings none."""
    if isinstance(group["params"], set):
        return dict(group)  # which torch refuses: a set has no order
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if "param_names" in group or any(not isinstance(param, Tensor) for param in params):
        return {**group, "params": params}
    return {**group, "params": params, "param_names": [f"{label}[{i}]" for i in range(len(params))]}


def check_same_parameters(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError if saved groups hold other parameters, or send them to another algorithm."""
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        for key in ("algorithm", "param_names"):
            if key in saved and saved[key] != group[key]:
                raise ValueError(
                    f"{group_label(group, index)}: {key} of the state dict differs:"
                    f" {_first_difference(saved[key], group[key])}."
                    " Route the parameters as in the run that saved it."
                )


def _first_difference(saved: Any, expected: Any) -> str:
    if isinstance(saved, list) and isinstance(expected, list):
        for a, b in zip(saved, expected, strict=False):
            if a != b:
                return f"it has {a!r} where this optimizer has {b!r}"
        return f"it has {len(saved)} parameters where this optimizer has {len(expected)}"
    return f"it has {saved!r} where this optimizer has {expected!r}"


def check_options(label: str, options: Mapping[str, Any], hyperparameters: Iterable[str]) -> None:
    """Raise a ValueError if a group has an unknown option, or an option a value out of its range."""
    for key in options:
        if key not in {*hyperparameters, *_BOOKKEEPING, *_SCHEDULER_KEYS}:
            raise ValueError(f"{label}: unknown option {key!r}; known are {', '.join(hyperparameters)}")
    for key, low, high in (("lr", 0.0, None), ("weight_decay", 0.0, None), ("eps", 0.0, None), ("momentum", 0.0, 1.0)):
        _check_number(label, key, options[key], low, high)
    if options["neuron_beta"] is not None:
        _check_number(label, "neuron_beta", options["neuron_beta"], 0.0, 1.0)
    if options["batch_elements"] is not None:
        _check_number(label, "batch_elements", options["batch_elements"], 1, None)
    betas = options["betas"]
    if len(betas) != 2:
        raise ValueError(f"{label}: betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        _check_number(label, f"betas[{i}]", beta, 0.0, 1.0)
    try:
        orthogonalize(torch.ones(1, 1), options["orthogonalizer"], **options["orthogonalizer_options"])
        scale_factor(options["update_scale"], 1, 1)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{label}: {error}") from None


def _check_number(label: str, key: str, value: Any, low: float, high: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{label}: {key} must be a number, got {value!r}")
    if not (value >= low and (high is None or value < high)):
        raise ValueError(
            f"{label}: {key} must be at least {low:g}{f' and below {high:g}' if high else ''}, got {value}"
        )


def check_parameters(label: str, group: Mapping[str, Any]) -> None:
    """Raise a ValueError if a group holds a parameter that its algorithm cannot update."""
    for key in ("param_names", "layouts"):
        if key in group and len(group[key]) != len(group["params"]):
            raise ValueError(f"{label}: {len(group[key])} {key} for {len(group['params'])} parameters")
    for name, param, layout in zip(group["param_names"], group["params"], matrix_layouts(group), strict=True):
        if not param.is_floating_point():
            raise ValueError(f"{label}: {name} is {param.dtype}; only real floating-point parameters can be updated")
        if group["algorithm"] == "adamw":
            continue
        if param.ndim != 2 and "layouts" not in group:
            raise ValueError(
                f"{label}: {name} has shape {tuple(param.shape)}, and Muon needs to know where its matrices are."
                " route_parameters(module) finds out; or give the group 'layouts'."
            )
        try:
            layout.check(param.shape)
        except ValueError as error:
            raise ValueError(f"{label}: {name}: {error}") from None
