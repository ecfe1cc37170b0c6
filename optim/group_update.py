"""The update of a parameter group: each parameter in the way that the plan has for it."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from lightning_muon.optim.adamw_update import AdamWParameter, adamw_update
from lightning_muon.optim.muon_update import MuonParameter, OrthogonalizeHook, muon_update
from lightning_muon.optim.parameter_group import matrix_layouts
from lightning_muon.optim.parameter_state import state_tensor
from lightning_muon.optim.sharding.dtensor import local_gradient, local_tensor
from lightning_muon.optim.sharding.kept_state import Kept
from lightning_muon.optim.sharding.kept_update import (
    KeptAdamWParameter,
    KeptMuonParameter,
    kept_adamw_update,
    kept_muon_update,
)
from lightning_muon.optim.sharding.plan import GroupPlan
from lightning_muon.optim.sharding.redistribution import RedistributedParameter, redistributed_muon_update
from lightning_muon.optim.sharding.rounds import Round
from lightning_muon.optim.sharding.sharded_update import ShardedParameter, sharded_muon_update

# The state of each parameter by its name; what is missing is put in.
States = MutableMapping[Tensor, dict[str, Any]]


def update_muon_group(
    group: Mapping[str, Any], plan: GroupPlan, states: States, hooks: Sequence[OrthogonalizeHook]
) -> None:
    """Update the parameters of a muon group by one step.

    Args:
        group: The parameters and their options.
        plan: Which of them are updated in which way.
        states: The optimizer's state.
        hooks: Who hears of what this rank orthogonalizes.
    """
    names, params, layouts = group["param_names"], group["params"], matrix_layouts(group)

    def held(index: int) -> MuonParameter | None:
        """Return what this rank holds of a parameter, its gradient and state; None without gradient."""
        param, gradient = params[index], _gradient(names[index], params[index])
        if gradient is None:
            return None
        momentum, mean_square = _muon_state(param, group, states)
        return MuonParameter(
            names[index],
            local_tensor(param),
            local_gradient(param, gradient, names[index]),
            local_tensor(momentum),
            None if mean_square is None else local_tensor(mean_square),
            layouts[index],
        )

    def kept(index: int) -> KeptMuonParameter:
        """Return a parameter, its gradient, and the state that this rank keeps."""
        param, gradient = params[index], _gradient(names[index], params[index])
        state = (None, None) if gradient is None else _muon_state(param, group, states, plan.kept[index])
        return KeptMuonParameter(names[index], param, gradient, layouts[index], *state)

    muon_update((p for p in map(held, plan.alone) if p is not None), group, hooks)
    redistributed = (RedistributedParameter(names[i], params[i], layouts[i], held(i)) for i in plan.redistributed)
    redistributed_muon_update(redistributed, group, hooks)
    sharded = {i: ShardedParameter(names[i], local_tensor(params[i]), held(i)) for i in _members(plan.rounds)}
    sharded_muon_update(sharded, plan.rounds, group, hooks)
    kept_muon_update({i: kept(i) for i in _members(plan.kept_rounds)}, plan.kept_rounds, group, hooks)


def update_adamw_group(group: Mapping[str, Any], plan: GroupPlan, states: States) -> None:
    """Update the parameters of an adamw group by one step.

    Args:
        group: The parameters and their options.
        plan: Which of them are updated in which way.
        states: The optimizer's state.
    """
    names, params = group["param_names"], group["params"]
    gradients = [_gradient(name, param) for name, param in zip(names, params, strict=True)]
    alone: list[AdamWParameter] = []
    for index in plan.alone:
        if (gradient := gradients[index]) is not None:
            average, square_average, step_count = _adamw_state(params[index], states)
            local = local_gradient(params[index], gradient, names[index])
            moments = local_tensor(average), local_tensor(square_average)
            alone.append((local_tensor(params[index]), local, *moments, step_count))
    adamw_update(alone, group)

    def kept(index: int) -> KeptAdamWParameter:
        """Return a parameter, its gradient, and the state that this rank keeps."""
        state = None if gradients[index] is None else _adamw_state(params[index], states, plan.kept[index])
        return KeptAdamWParameter(params[index], gradients[index], plan.kept[index], state)

    kept_adamw_update([[kept(index) for index in pack] for pack in plan.kept_packs], group)


def _members(rounds: Iterable[Round]) -> list[int]:
    return [index for round_ in rounds for index in round_.members]


def _muon_state(
    param: Tensor, group: Mapping[str, Any], states: States, kept: Kept | None = None
) -> tuple[Tensor, Tensor | None]:
    momentum = state_tensor(states[param], "momentum_buffer", param, kept)
    if group["neuron_beta"] is None:
        return momentum, None
    return momentum, state_tensor(states[param], "neuron_mean_square", param, kept)


def _adamw_state(param: Tensor, states: States, kept: Kept | None = None) -> tuple[Tensor, Tensor, Tensor]:
    average = state_tensor(states[param], "exp_avg", param, kept)
    square_average = state_tensor(states[param], "exp_avg_sq", param, kept)
    return average, square_average, state_tensor(states[param], "step", param, kept)


def _gradient(name: str, param: Tensor) -> Tensor | None:
    """Return the gradient of a parameter; None if there is none, or nothing to update."""
    if param.grad is None or param.numel() == 0:
        return None
    if param.grad.is_sparse:
        raise ValueError(f"{name} has a sparse gradient, which MuonAdamW cannot use: make its module sparse=False")
    return param.grad
