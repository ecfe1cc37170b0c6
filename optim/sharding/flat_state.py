"""Optimizer state in the form that FSDP1 wants it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.parameter_state import ADAMW_STATE, MUON_STATE, state_dtype, state_names
from lightning_muon.optim.sharding.fully_sharded_data_parallel import is_flattened


def fill_state(groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any], state_dict: dict[str, Any]) -> None:
    """Give all parameters that FSDP1 has flattened state of the same names, with zeros for what they do not have.

    FSDP1 reads the state of all parameters in one flat parameter as if these had one optimizer, with the same names on
    every rank, whatever of the parameters is there. The zeros take no memory.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state.
        state_dict: What is saved of it; changed in place.
    """
    names = frozenset[str]().union(*map(state_names, groups))
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for p, key in zip(group["params"], saved["params"], strict=True):
            if is_flattened(p) and p in state:
                zeros = {name: _zeros(name, p) for name in sorted(names - state[p].keys())}
                state_dict["state"][key] = {**state_dict["state"][key], **zeros}


def drop_filled_state(groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Undo :func:`fill_state` in a state that was loaded, wherever the parameters live now."""
    for group in groups:
        foreign = (ADAMW_STATE | MUON_STATE) - state_names(group)
        for p in group["params"]:
            if p in state:
                for name in foreign & state[p].keys():
                    del state[p][name]


def _zeros(name: str, param: Tensor) -> Tensor:
    if name == "step":
        return torch.zeros((), dtype=state_dtype(name, param))
    return torch.zeros((), dtype=state_dtype(name, param), device=param.device).expand(param.shape)
