"""What the optimizer keeps for a parameter, and in which precision."""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.sharding.kept_state import Kept

HALF = (torch.float16, torch.bfloat16)

ADAMW_STATE = frozenset({"exp_avg", "exp_avg_sq", "step"})
MUON_STATE = frozenset({"momentum_buffer", "neuron_mean_square"})


def state_names(group: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the state of a parameter in a group."""
    if group["algorithm"] == "adamw":
        return ADAMW_STATE
    return MUON_STATE if group["neuron_beta"] is not None else MUON_STATE - {"neuron_mean_square"}


def state_dtype(name: str, param: Tensor) -> torch.dtype:
    """Return the dtype of a part of the state.

    The momentum has the parameter's, but float32 for float16, whose range ends at 6e-8. What changes little in a step,
    such as AdamW's averages, has at least float32.
    """
    half = (torch.float16,) if name == "momentum_buffer" else HALF
    return torch.float32 if param.dtype in half or name == "step" else param.dtype


def state_tensor(state: MutableMapping[str, Any], name: str, param: Tensor, kept: Kept | None = None) -> Tensor:
    """Return a part of the state of a parameter, zero at first.

    Args:
        state: Of this parameter; a part that it lacks is put in.
        name: Of the part.
        param: The parameter.
        kept: Which elements of the state this rank keeps, if not all that it holds of the parameter.

    Returns:
        Always in the layout of the parameter, or (elements,) of which are kept; the number of steps is a scalar.
    """
    if name not in state:
        dtype = state_dtype(name, param)
        if name == "step":
            state[name] = torch.zeros((), dtype=dtype)
        elif kept is not None:
            state[name] = torch.zeros(kept.size(kept.sharding.group.rank()), dtype=dtype, device=param.device)
        else:
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    tensor: Tensor = state[name]
    return tensor
