"""The optimizer state of a parameter: its names and dtypes."""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

ADAMW_STATE = frozenset({"exp_avg", "exp_avg_sq", "step"})
MUON_STATE = frozenset({"momentum_buffer", "neuron_mean_square"})

# The state of each parameter, by its name.
States = MutableMapping[Tensor, dict[str, Any]]


def state_names(group: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the state of a parameter in a group."""
    if group["algorithm"] == "adamw":
        return ADAMW_STATE
    return MUON_STATE if group["neuron_beta"] is not None else MUON_STATE - {"neuron_mean_square"}


def state_dtype(name: str, param: Tensor) -> torch.dtype:
    """Return the dtype of a state.

    The momentum has the dtype of its parameter, but float32 for float16, whose range ends at 6e-8. States that change
    little in a step, such as AdamW's averages, have at least float32.
    """
    half = (torch.float16,) if name == "momentum_buffer" else HALF
    return torch.float32 if param.dtype in half or name == "step" else param.dtype


def state_tensor(state: MutableMapping[str, Any], name: str, param: Tensor, elements: int | None = None) -> Tensor:
    """Return the state ``name`` of a parameter; a missing one is added to ``state``, zero.

    It has the layout of the parameter, or the shape (elements,) where the ranks share it out (ZeRO-1); the number of
    steps is a scalar.
    """
    if name not in state:
        dtype = state_dtype(name, param)
        if name == "step":
            state[name] = torch.zeros((), dtype=dtype)
        elif elements is not None:
            state[name] = torch.zeros(elements, dtype=dtype, device=param.device)
        else:
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    tensor: Tensor = state[name]
    return tensor
