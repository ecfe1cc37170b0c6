"""What a parameter group of MuonAdamW holds, and the errors that say when it does not."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.orthogonalize import orthogonalize
from lightning_muon.optim.sharding.dtensor import is_dtensor, is_sharded_by_rows
from lightning_muon.optim.sharding.fully_sharded_data_parallel import is_flattened
from lightning_muon.optim.sharding.sharding import Sharding
from lightning_muon.optim.update_scale import scale_factor

Algorithm = Literal["muon", "adamw"]
ALGORITHMS = get_args(Algorithm)
CommunicationDtype = Literal["bfloat16", "float32"]

# What routing and the schedulers of torch write into a group beside the hyperparameters.
_BOOKKEEPING = {"params", "param_names", "name", "algorithm", "layouts", "reasons", "shardings"}
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
    if options["communication_dtype"] not in {None, *get_args(CommunicationDtype)}:
        raise ValueError(
            f"{label}: communication_dtype is {options['communication_dtype']!r},"
            f" choose one of {', '.join(get_args(CommunicationDtype))}, or None"
        )
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


def check_parameters(label: str, group: Mapping[str, Any], shardings: Sequence[Sharding | None]) -> None:
    """Raise a ValueError if a group holds a parameter that its algorithm cannot update.

    Args:
        label: The name of the group.
        group: The group.
        shardings: Where its parameters live, as far as they cannot tell by themselves.
    """
    for key in ("param_names", "layouts"):
        if key in group and len(group[key]) != len(group["params"]):
            raise ValueError(f"{label}: {len(group[key])} {key} for {len(group['params'])} parameters")
    if len(shardings) != len(group["params"]):
        raise ValueError(f"{label}: {len(shardings)} shardings for {len(group['params'])} parameters")
    for name, param, layout, sharding in zip(
        group["param_names"], group["params"], matrix_layouts(group), shardings, strict=True
    ):
        shape = param.shape if sharding is None else sharding.shape
        if not param.is_floating_point():
            raise ValueError(f"{label}: {name} is {param.dtype}; only real floating-point parameters can be updated")
        if group["algorithm"] == "adamw":
            continue
        if sharding is None and is_flattened(param):
            raise ValueError(
                f"{label}: FSDP has flattened {name}, and Muon needs to know the shape that it had:"
                " route_parameters(module) finds out, given the module that FSDP wraps or the LightningModule."
            )
        if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
            raise ValueError(f"{label}: {name} is placed as {param.placements}: a sum that is still to be taken")
        if is_dtensor(param) and not is_sharded_by_rows(param) and group["neuron_beta"] is not None:
            raise ValueError(
                f"{label}: {name} is placed as {param.placements}, and neuron_beta needs rows of one rank each:"
                " shard it by rows, or route it into a group with neuron_beta=None"
            )
        if len(shape) != 2 and "layouts" not in group:
            raise ValueError(
                f"{label}: {name} has shape {tuple(shape)}, and Muon needs to know where its matrices are."
                " route_parameters(module) finds out; or give the group 'layouts'."
            )
        try:
            layout.check(shape)
        except ValueError as error:
            raise ValueError(f"{label}: {name}: {error}") from None
