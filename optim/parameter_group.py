"""What a parameter group of MuonAdamW contains, and the errors of those that are wrong."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor
from typing_extensions import Self, override

from lightning_muon.optim.polar.orthogonalize import check_method
from lightning_muon.optim.routing.roles import ROLES
from lightning_muon.optim.sharding.dtensor import is_dtensor, is_sharded_by_rows
from lightning_muon.optim.sharding.sharding import Sharding
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.update.matrix_layout import matrix_layouts
from lightning_muon.optim.update.options import ALGORITHMS, CommunicationDtype, MomentumDtype, check_number
from lightning_muon.optim.update.scale import check_update_scale

# Keys that routing and torch's schedulers write into a group beside the hyperparameters.
_BOOKKEEPING = {"params", "param_names", "name", "algorithm", "role", "layouts", "reasons", "shardings", "added"}
_SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
# Hyperparameters that are numbers, with the lowest value and the one below which they are.
_NUMBERS: tuple[tuple[str, float, float | None], ...] = (
    ("lr", 0.0, None),
    ("weight_decay", 0.0, None),
    ("eps", 0.0, None),
    ("momentum", 0.0, 1.0),
    ("neuron_beta", 0.0, 1.0),
    ("fixed_norm", 0.0, None),
    ("batch_elements", 1, None),
)
_MAY_BE_NONE = {"neuron_beta", "fixed_norm", "batch_elements"}
_CHOICES = {"momentum_dtype": get_args(MomentumDtype), "communication_dtype": get_args(CommunicationDtype)}
# bfloat16 has 8 significant bits: half the distance of its numbers just above a power of two.
_LEAST_DECAY_IN_BFLOAT16 = 2**-8


class AddedGroup(dict[str, Any]):
    """The last of several groups that were added as one: to set its learning rate sets that of the others too.

    Lightning's ``BackboneFinetuning`` adds one group, and raises the learning rate of the last one afterwards.
    """

    others: Sequence[dict[str, Any]] = ()

    def __setitem__(self, key: str, value: Any) -> None:
        """Set an option."""
        super().__setitem__(key, value)
        if key == "lr":
            for group in self.others:
                group["lr"] = value


class MuonGroup(AddedGroup):
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


def linked(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups, plain ones for instance, of the classes that they have in the optimizer."""
    found = [MuonGroup(group) if group.get("algorithm") == "muon" else group for group in groups]
    last = {group["added"]: index for index, group in enumerate(found) if "added" in group}
    for number, index in last.items():
        if not isinstance(found[index], AddedGroup):
            found[index] = AddedGroup(found[index])
        found[index].others = [g for g in found[:index] if g.get("added") == number]  # type: ignore[attr-defined]
    return found


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
    if "role" in options and options["role"] not in ROLES:
        raise ValueError(f"{label}: role is {options['role']!r}, choose one of {', '.join(ROLES)}")
    for key in options:
        if key not in {*hyperparameters, *_BOOKKEEPING, *_SCHEDULER_KEYS}:
            raise ValueError(f"{label}: unknown option {key!r}; known are {', '.join(hyperparameters)}")
    for key, low, high in _NUMBERS:
        if options[key] is not None or key not in _MAY_BE_NONE:
            check_number(label, key, options[key], low, high)
    for key, choices in _CHOICES.items():
        if options[key] not in (None, *choices):
            raise ValueError(f"{label}: {key} is {options[key]!r}, choose one of {', '.join(choices)}, or None")
    betas = options["betas"]
    if len(betas) != 2:
        raise ValueError(f"{label}: betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(label, f"betas[{i}]", beta, 0.0, 1.0)
    _check_decay_in_bfloat16(label, options)
    try:
        check_method(options["orthogonalizer"], options["orthogonalizer_options"])
        check_update_scale(options["update_scale"])
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def _check_decay_in_bfloat16(label: str, options: Mapping[str, Any]) -> None:
    """Raise a ValueError if an average in bfloat16 would be rounded to what it was when it decays."""
    muon = options["algorithm"] == "muon"
    decays = {"momentum": options["momentum"]} if muon else {f"betas[{i}]": b for i, b in enumerate(options["betas"])}
    for key, decay in decays.items():
        if options["momentum_dtype"] == "bfloat16" and 1 - decay < _LEAST_DECAY_IN_BFLOAT16:
            remedy = "float32" if muon else "float32 or int8"
            raise ValueError(
                f"{label}: {key} is {decay}, but an average in bfloat16 cannot decay by less than 2**-8 in a step: set"
                f" momentum_dtype of this group to {remedy}, or {key} to at most {1 - _LEAST_DECAY_IN_BFLOAT16:.3f}"
            )


def check_one_momentum(label: str, options: Mapping[str, Any]) -> None:
    """Raise a ValueError if a muon group was given ``betas`` that contradict its ``momentum``."""
    if options["betas"][0] != options["momentum"]:
        raise ValueError(
            f"{label}: betas[0] is {options['betas'][0]} and momentum is {options['momentum']}, but in a muon group"
            " both are the decay of the momentum: leave betas to the adamw groups, and set momentum"
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
        if not (param.is_floating_point() or param.is_complex()):
            raise ValueError(f"{label}: {name} is {param.dtype}; only floating-point parameters can be updated")
        if group["algorithm"] == "adamw":
            continue
        if param.is_complex():
            raise ValueError(
                f"{label}: {name} is {param.dtype}, and Muon updates real matrices:"
                " move it to a group with algorithm 'adamw', as route_parameters(module) does"
            )
        if sharding is None and is_flattened(param):
            raise ValueError(
                f"{label}: FSDP has flattened {name}, and Muon needs to know the shape that it had:"
                " route_parameters(module) finds out, given the module that FSDP wraps or the LightningModule."
            )
        if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
            raise ValueError(f"{label}: {name} is placed as {param.placements}: partial sums, which cannot be updated")
        for option in ("neuron_beta", "fixed_norm"):
            if is_dtensor(param) and not is_sharded_by_rows(param) and group[option] is not None:
                raise ValueError(
                    f"{label}: {name} is placed as {param.placements}, and {option} needs rows of one rank each:"
                    f" shard it by rows, or route it into a group with {option}=None"
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
