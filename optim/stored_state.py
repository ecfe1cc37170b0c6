"""The state of a parameter in two forms: full, as in checkpoints, and as it is stored between steps.

In full every tensor has the layout of the parameter and the precision in which it is updated. So a checkpoint can be
loaded with any ``momentum_dtype``, on any number of ranks. Stored between steps are codes of one byte, rounded values,
and one number for each neuron.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.sharding.dtensor import local_tensor, with_shard
from lightning_muon.optim.sharding.plan import Plan
from lightning_muon.optim.update.state import AVERAGES, SCALES, Average, State, encoded, state_dtype, stored_dtype


def store_state(optimizer: torch.optim.Optimizer, plans: Sequence[Plan]) -> None:
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
        full: Its state in full.
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
    """Undo :func:`stored_state`; what is stored as it is stays the same tensor.

    Of state that the ranks share out (ZeRO-1) the result has this rank's share, shape (elements,).
    """
    kept = group["momentum_dtype"]
    full: State = {}
    for name, value in state.items():
        if name.endswith(SCALES):
            continue
        if name == "neuron_mean_square" or name + SCALES in state:
            if name == "neuron_mean_square":
                elements = plan.neurons[index].elements(value)
            else:
                elements = Average(name, value, state[name + SCALES], state_dtype(name, param, kept)).read()
            full[name] = elements if index in plan.shares else with_shard(elements, param)
        elif name in AVERAGES and kept == "bfloat16":
            # The dtype of the other state, since FSDP1 gathers that of one flat parameter together.
            full[name] = value.to(state_dtype(name, param, "float32"))
        else:
            full[name] = value
    return full
