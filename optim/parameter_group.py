"""What a parameter group of MuonAdamW contains, and the errors of those that are wrong."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_muon.optim.polar.orthogonalize import orthogonalize
from lightning_muon.optim.sharding.dtensor import is_dtensor, is_sharded_by_rows
from lightning_muon.optim.sharding.sharding import Sharding
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.update.matrix_layout import matrix_layouts
from lightning_muon.optim.update.options import ALGORITHMS, CommunicationDtype
from lightning_muon.optim.update.scale import scale_factor

# Keys that routing and torch's schedulers write into a group beside the hyperparameters.
_BOOKKEEPING = {"params", "param_names", "name", "algorithm", "layouts", "reasons", "shardings"}
_SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}


class MuonGroup(dict[str, Any]):
    """A parameter group of Muon, in which ``betas[0]`` is another name of ``momentum``: to set one sets the other.

    Schedulers that cycle the momentum, and Lightning's ``LearningRateMonitor``, know only ``betas`` where an optimizer
    has them. Where both are given at once, ``momentum`` counts. State dicts contain plain dictionaries.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        super().__init__()
        self.update(group)

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        if key == "betas":
            value = tuple(value)  # an entry of a list could be set unseen
            super().__setitem__("momentum", value[0])
        super().__setitem__(key, value)
        if key == "momentum" and "betas" in self:
            super().__setitem__("betas", (value, *self["betas"][1:]))

    @override
    def setdefault(self, key: str, default: Any = None, /) -> Any:
        if key not in self:
            both = key == "betas" and "momentum" in self
            self[key] = (self["momentum"], *default[1:]) if both else default
        return self[key]

    @override
    def update(self, *args: Any, **kwargs: Any) -> None:
        new = dict(*args, **kwargs)
        for key in sorted(new, key="momentum".__eq__):  # the momentum last, the others in their order
            self[key] = new[key]

    @override
    def __ior__(self, other: Any) -> Self:  # type: ignore[override]
        self.update(other)
        return self


def group_label(group: Any, index: int) -> str:
    """Return the name of a group for messages."""
    name = group.get("name") if isinstance(group, dict) else None
    return f"parameter group {index} ({name})" if name else f"parameter group {index}"


def named(group: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the group with ``param_names``, made from its label where it has none."""
    params = group["params"]
    if isinstance(params, set):
        return dict(group)  # torch refuses a set, which has no order
    params = [params] if isinstance(params, Tensor) else list(params)
    if "param_names" in group or any(not isinstance(param, Tensor) for param in params):
        return {**group, "params": params}
    return {**group, "params": params, "param_names": [f"{label}[{i}]" for i in range(len(params))]}


def check_algorithm(label: str, group: Any) -> None:
    """Raise a ValueError if the algorithm of a group is unknown."""
    algorithm = group.get("algorithm") if isinstance(group, dict) else None
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"{label}: algorithm is {algorithm!r}, choose one of {', '.join(ALGORITHMS)}."
            " route_parameters(module) makes groups with the right algorithm for each parameter."
        )


def check_options(label: str, options: Mapping[str, Any], hyperparameters: Iterable[str]) -> None:
    """Raise a ValueError if a group has an option that is not in ``hyperparameters``, or a value out of its range.

    ``options`` are those of the group, with the defaults.
    """
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


def check_one_momentum(label: str, options: Mapping[str, Any]) -> None:
    """Raise a ValueError if a muon group was given ``betas`` that contradict its ``momentum``."""
    if options["betas"][0] != options["momentum"]:
        raise ValueError(
            f"{label}: betas[0] is {options['betas'][0]} and momentum is {options['momentum']}, but in a muon group"
            " both are the decay of the momentum: leave betas to the adamw groups, and set momentum"
        )


def _check_number(label: str, key: str, value: Any, low: float, high: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{label}: {key} must be a number, got {value!r}")
    if not (value >= low and (high is None or value < high)):
        raise ValueError(
            f"{label}: {key} must be at least {low:g}{f' and below {high:g}' if high else ''}, got {value}"
        )


def check_parameters(label: str, group: Mapping[str, Any], shardings: Sequence[Sharding | None]) -> None:
    """Raise a ValueError if a group contains a parameter that its algorithm cannot update.

    ``shardings`` contains ``None`` for DTensors and for parameters that are whole on one rank.
    """
    for key, entries in {**group, "shardings": shardings}.items():
        if key in {"param_names", "layouts", "shardings"} and len(entries) != len(group["params"]):
            raise ValueError(f"{label}: {len(entries)} {key} for {len(group['params'])} parameters")
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
            raise ValueError(f"{label}: {name} is placed as {param.placements}: partial sums, which cannot be updated")
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
