"""What MuonAdamW saves and loads: checks, and the state in the form that each strategy needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.parameter_group import group_label
from lightning_muon.optim.sharding.dtensor import laid_out_as, local_tensor, with_shard
from lightning_muon.optim.sharding.plan import Plan
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.update.state import (
    ADAMW_STATE,
    AVERAGES,
    HALF,
    MUON_STATE,
    SCALES,
    Average,
    State,
    encoded,
    state_dtype,
    state_names,
    stored_dtype,
)

Groups = Sequence[Mapping[str, Any]]

# What a group says of this run, whatever the run said that saved the state.
_OF_THIS_RUN = ("layouts", "momentum_dtype")


@contextmanager
def restored(optimizer: torch.optim.Optimizer, plans: Callable[[], Sequence[Plan]]) -> Iterator[None]:
    """Check and complete what torch's ``load_state_dict`` does inside this context.

    State of DTensors is sharded like them, state that the ranks share out is cut to this rank's share, and what
    :func:`fill_state` has added is dropped. Then each state is stored as the options of its group say, see
    :func:`stored_state`. Layouts, shardings and ``momentum_dtype`` stay those of the optimizer.

    Raises:
        ValueError: If the groups of the state dict contain other parameters, or update them by another algorithm.
    """
    loaded: dict[str, Any] = {}
    kept = [{key: group[key] for key in _OF_THIS_RUN if key in group} for group in optimizer.param_groups]

    def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        _check_same_parameters(optimizer.param_groups, state_dict["param_groups"])
        loaded.update(state_dict)

    def after(_: torch.optim.Optimizer) -> None:
        for group, own in zip(optimizer.param_groups, kept, strict=True):
            group.update(own)
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
        _store(optimizer, plans())

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


def _store(optimizer: torch.optim.Optimizer, plans: Sequence[Plan]) -> None:
    """Bring loaded state into the form in which it is stored between steps."""
    for plan in plans:
        for index, (number, place) in enumerate(plan.members):
            group = optimizer.param_groups[number]
            param = group["params"][place]
            if param in optimizer.state:
                optimizer.state[param] = stored_state(param, optimizer.state[param], group, plan, index)


def stored_state(param: Tensor, full: Mapping[str, Any], group: Mapping[str, Any], plan: Plan, index: int) -> State:
    """Return the state of a parameter as it is stored between steps.

    Averages are rounded or encoded as ``momentum_dtype`` says, and of the mean squares of neurons one number each is
    left.

    Args:
        param: The parameter.
        full: Its state as in a checkpoint: every tensor has the shape of the parameter.
        group: Its group.
        plan: The plan that contains it.
        index: Its position there.
    """
    if index in plan.shares:
        full = plan.shares[index].of_state(full)
    state: State = {}
    for name, value in full.items():
        if name == "neuron_mean_square":
            state[name] = plan.neurons[index].numbers(local_tensor(value))
        elif name in AVERAGES:
            kept = group["momentum_dtype"]
            dtype = stored_dtype(name, param, kept)
            if dtype.is_floating_point or dtype.is_complex:
                state[name] = value.to(dtype)
            else:
                state.update(encoded(name, local_tensor(value).to(state_dtype(name, param, kept))))
        else:
            state[name] = value
    return state


def full_state(param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], plan: Plan, index: int) -> State:
    """Undo :func:`stored_state`: return the state with every tensor in the layout of the parameter.

    So a checkpoint can be loaded with any ``momentum_dtype`` on any number of ranks. Of state that the ranks share out
    (ZeRO-1) the result has this rank's share, shape (elements,).
    """
    full: State = {}
    for name, value in state.items():
        if name == "neuron_mean_square":
            elements = plan.neurons[index].elements(value)
        elif name + SCALES in state:
            dtype = state_dtype(name, param, group["momentum_dtype"])
            elements = Average(name, value, state[name + SCALES], dtype).read()
        elif _is_rounded(name, value, group):
            full[name] = value.to(state_dtype(name, param, "float32"))
            continue
        elif not name.endswith(SCALES):
            full[name] = value
            continue
        else:
            continue
        full[name] = elements if index in plan.shares else with_shard(elements, param)
    return full


def is_stored_smaller(state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Return whether a state differs from :func:`full_state`."""
    return any(
        name == "neuron_mean_square" or name.endswith(SCALES) or _is_rounded(name, value, group)
        for name, value in state.items()
    )


def _is_rounded(name: str, value: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether an average is stored in bfloat16 because ``momentum_dtype`` says so.

    In checkpoints it has the dtype of the others, since FSDP1 gathers those of one flat parameter together.
    """
    return name in AVERAGES and group["momentum_dtype"] == "bfloat16" and value.dtype == torch.bfloat16


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


def _check_same_parameters(groups: Groups, saved_groups: Groups) -> None:
    """Raise a ValueError if saved groups contain other parameters, or update them by another algorithm."""
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
