"""What MuonAdamW saves and loads: checks, and the state in the form that each strategy needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.parameter_group import group_label
from lightning_muon.optim.saved_groups import complete_names, regrouped
from lightning_muon.optim.sharding.dtensor import laid_out_as
from lightning_muon.optim.sharding.plan import Plan
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.stored_state import store_state
from lightning_muon.optim.update.state import ADAMW_STATE, HALF, MUON_STATE, state_dtype, state_names

Groups = Sequence[Mapping[str, Any]]
# Options that may be functions. Checkpoints contain their import paths.
FUNCTIONS = ("orthogonalizer", "update_scale")


@contextmanager
def restored(optimizer: torch.optim.Optimizer, plans: Callable[[], Sequence[Plan]]) -> Iterator[None]:
    """Check and complete what torch's ``load_state_dict`` does inside this context.

    Groups are matched by the names of their parameters, wherever all have one. State of DTensors is sharded like them,
    and what :func:`fill_state` has added is dropped. Then each state is stored as the options of its group say, see
    :func:`~lightning_muon.optim.stored_state.stored_state`. What describes a group stays that of the optimizer, such as
    its name, role and layouts, and so do ``momentum_dtype`` and functions of the user.

    Raises:
        ValueError: If the groups of the state dict contain other parameters, update them by another algorithm, or have
            different hyperparameters for the parameters of one group.
    """
    loaded: dict[str, Any] = {}
    own = [
        {k: v for k, v in group.items() if k in {"layouts", "momentum_dtype"} or (k in FUNCTIONS and callable(v))}
        for group in optimizer.param_groups
    ]

    def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = optimizer.param_groups
        names = _saved_names(groups, state_dict["param_groups"])
        if names is None:
            _check_same_parameters(groups, state_dict["param_groups"])
        else:
            state_dict = regrouped(groups, state_dict, names)
        loaded.update(state_dict)
        return state_dict

    def after(_: torch.optim.Optimizer) -> None:
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)
            group.pop("shardings", None)  # an empty one, of another optimizer on groups of route_parameters
        for group, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                if param.dtype in HALF:
                    for name, value in loaded["state"].get(key, {}).items():
                        if name != "step":  # torch has cast the others to the dtype of the parameter
                            optimizer.state[param][name] = value.to(device=param.device, copy=True)
        for group in optimizer.param_groups:
            foreign = (ADAMW_STATE | MUON_STATE) - state_names(group)
            for param in group["params"]:
                if state := optimizer.state.get(param):
                    known = {name: value for name, value in state.items() if name not in foreign}
                    optimizer.state[param] = {name: laid_out_as(value, param) for name, value in known.items()}
        store_state(optimizer, plans())

    # After the hooks that others registered before loading, and before their hooks after it.
    hooks = [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fill_state(groups: Groups, state: Mapping[Tensor, Any], state_dict: dict[str, Any]) -> None:
    """Add zeros to the saved state of parameters that FSDP1 has flattened, so that all have state of the same names.

    FSDP1 saves the parameters of one flat parameter as if they had one optimizer, with the same names on every rank,
    whatever part of them the rank has. The zeros take no memory. ``state_dict`` is changed in place.
    """
    names = frozenset[str]().union(*map(state_names, groups))
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for p, key in zip(group["params"], saved["params"], strict=True):
            if is_flattened(p) and p in state:
                zeros = {name: _zeros(name, p) for name in sorted(names - state[p].keys())}
                state_dict["state"][key] = {**state_dict["state"][key], **zeros}


def _zeros(name: str, param: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=state_dtype(name, param))
    return zero if name == "step" else zero.to(param.device).expand(param.shape)


def _saved_names(groups: Groups, saved_groups: Groups) -> list[list[str]] | None:
    """Return the names of the parameters in saved groups, in the order of ``params``; ``None`` if some have none."""
    names = complete_names(saved_groups)
    if names is None or complete_names(groups) is None:
        return None
    if any(is_flattened(p) for group in groups for p in group["params"]):
        # FSDP1 has replaced the saved keys by the numbers of this optimizer's parameters, and sorted them in each
        # group, but not the names.
        own = dict(enumerate(name for group in groups for name in group["param_names"]))
        numbered = [[own.get(number, "") for number in group["params"]] for group in saved_groups]
        if [sorted(of_group) for of_group in numbered] != [sorted(of_group) for of_group in names]:
            raise ValueError(
                "under FSDP, MuonAdamW takes a state dict that FullyShardedDataParallel.optim_state_dict_to_load has"
                " made, in which parameters have their numbers in this optimizer"
            )
        return numbered
    return names


def _check_same_parameters(groups: Groups, saved_groups: Groups) -> None:
    """Raise a ValueError if saved groups contain other parameters by position, or update them by another algorithm."""
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        for key in ("algorithm", "param_names"):
            if key in saved and saved[key] != group[key]:
                raise ValueError(
                    f"{group_label(group, index)}: {key} of the state dict differs:"
                    f" {_first_difference(saved[key], group[key])}. Route the parameters as in the run that saved it."
                )


def _first_difference(saved: Any, expected: Any) -> str:
    if isinstance(saved, list) and isinstance(expected, list):
        different = [(a, b) for a, b in zip(saved, expected, strict=False) if a != b]
        if not different:
            return f"it has {len(saved)} parameters where this optimizer has {len(expected)}"
        saved, expected = different[0]
    return f"it has {saved!r} where this optimizer has {expected!r}"
