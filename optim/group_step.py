"""A step of the parameter groups: each parameter in the way that its plan says."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_muon.optim.sharding.dtensor import local_gradient, local_tensor
from lightning_muon.optim.sharding.everywhere import Everywhere, moving_matrices
from lightning_muon.optim.sharding.exchange import overlap
from lightning_muon.optim.sharding.owners import Owners
from lightning_muon.optim.sharding.plan import Plan
from lightning_muon.optim.sharding.zero1 import OwnedState, adamw_shares_step
from lightning_muon.optim.update.adamw import AdamWParameter, adamw_update
from lightning_muon.optim.update.here import Here, same_shape_batches
from lightning_muon.optim.update.muon import Hooks, MuonParameter, muon_step, run
from lightning_muon.optim.update.options import AdamWOptions, MomentumDtype, MuonOptions
from lightning_muon.optim.update.quantization import block_count
from lightning_muon.optim.update.state import SCALES, Average, State, States, state_dtype, state_tensor, stored_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Groups = Sequence[Mapping[str, Any]]


def muon_step_of(plan: Plan, groups: Groups, states: States, hooks: Hooks) -> None:
    """Update the parameters of the muon groups in a plan by one step; missing state is added to ``states``."""
    shared_options = cast("MuonOptions", groups[plan.groups[0]])
    batch_elements = shared_options["batch_elements"]

    def parameter(index: int) -> MuonParameter:
        """Return this rank's elements of a parameter, their gradient and state."""
        group, name, param = _member(groups, plan, index)
        options = cast("MuonOptions", group)
        weight, gradient = _local(name, param, plan)
        momentum, mean_squares = None, None
        if gradient is not None:
            momentum = average_state("momentum_buffer", param, states, plan, index, options["momentum_dtype"])
            if options["neuron_beta"] is not None:
                dtype = state_dtype("neuron_mean_square", param)
                count = plan.neurons[index].count
                mean_squares = state_tensor(states[param], "neuron_mean_square", param, dtype, count)
        layout, fans = plan.layouts[index], plan.fans[index]
        return MuonParameter(name, layout, fans, options, weight, gradient, momentum, mean_squares)

    moving = [p for p in map(parameter, plan.here) if p.gradient is not None]
    for batch in same_shape_batches(moving, batch_elements):
        run(muon_step(Here([batch], shared_options, hooks)))
    if plan.everywhere:
        gathered = [(cast("DTensor", _member(groups, plan, i)[2]), parameter(i)) for i in plan.everywhere]
        for (param, p), live in zip(gathered, moving_matrices(gathered), strict=True):
            run(muon_step(Everywhere(param, p, live, shared_options, hooks)))
    for transport, buckets in ((Owners, plan.buckets), (OwnedState, plan.zero1_buckets)):
        if buckets:
            batches = ((bucket, [parameter(i) for i in bucket.members]) for bucket in buckets)
            overlap(muon_step(transport(bucket, batch, shared_options, hooks)) for bucket, batch in batches)


def adamw_step_of(plan: Plan, groups: Groups, states: States) -> None:
    """Update the parameters of the adamw groups in a plan by one step; missing state is added to ``states``."""

    def parameter(index: int) -> AdamWParameter:
        """Return this rank's elements of a parameter, or all where its state is shared out, with gradient and state."""
        group, name, param = _member(groups, plan, index)
        options = cast("AdamWOptions", group)
        weight, gradient = _local(name, param, plan)
        if gradient is None:
            return AdamWParameter(options, weight, None, None)
        kept = options["momentum_dtype"]
        averages = [average_state(key, param, states, plan, index, kept) for key in ("exp_avg", "exp_avg_sq")]
        steps = state_tensor(states[param], "step", param, state_dtype("step", param))
        return AdamWParameter(options, weight, gradient, (averages[0], averages[1], steps))

    adamw_update([parameter(index) for index in plan.here])
    if plan.zero1_packs:
        packs = (([parameter(i) for i in pack], [plan.shares[i] for i in pack]) for pack in plan.zero1_packs)
        overlap(adamw_shares_step(pack, shares) for pack, shares in packs)


def average_state(
    name: str, param: Tensor, states: States, plan: Plan, index: int, kept: MomentumDtype | None
) -> Average:
    """Return this rank's elements of a moving average; a missing one is added to ``states``, zero."""
    state, dtype = states[param], state_dtype(name, param, kept)
    if name not in state:
        _add_average(name, param, state, plan, index, kept)
    stored = local_tensor(state[name]) if plan.has_dtensors else state[name]
    return Average(name, stored, state.get(name + SCALES), dtype)


def _add_average(name: str, param: Tensor, state: State, plan: Plan, index: int, kept: MomentumDtype | None) -> None:
    """Add this rank's elements of a moving average to the state of a parameter, zero."""
    elements = plan.shares[index].numel() if index in plan.shares else None
    stored_as = stored_dtype(name, param, kept)
    if stored_as.is_floating_point or stored_as.is_complex:
        state_tensor(state, name, param, stored_as, elements)
        return
    # Codes are this rank's own: plain tensors, also of a DTensor, whose layout their scales could not have.
    shape = local_tensor(param).shape if elements is None else torch.Size([elements])
    scales_dtype = state_dtype(name, param, kept)
    state[name] = torch.zeros(shape, dtype=stored_as, device=param.device)
    state[name + SCALES] = torch.zeros(block_count(shape), dtype=scales_dtype, device=param.device)


def _member(groups: Groups, plan: Plan, index: int) -> tuple[Mapping[str, Any], str, Tensor]:
    """Return the group, the name and the parameter at a position of a plan."""
    number, place = plan.members[index]
    group = groups[number]
    return group, group["param_names"][place], group["params"][place]


def _local(name: str, param: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Return this rank's elements of a parameter and of its gradient; ``None`` without gradient or elements."""
    weight, gradient = local_tensor(param) if plan.has_dtensors else param, param.grad
    if gradient is None or param.numel() == 0:
        return weight, None
    if gradient.is_sparse:
        raise ValueError(f"{name} has a sparse gradient, which MuonAdamW cannot use: make its module sparse=False")
    return weight, local_gradient(param, gradient, name) if plan.has_dtensors else gradient
