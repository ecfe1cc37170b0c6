"""A step of a parameter group: each parameter in the way that its plan says."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from lightning_muon.optim.sharding.dtensor import local_gradient, local_tensor
from lightning_muon.optim.sharding.everywhere import Everywhere
from lightning_muon.optim.sharding.exchange import overlap
from lightning_muon.optim.sharding.owners import Owners
from lightning_muon.optim.sharding.plan import GroupPlan
from lightning_muon.optim.sharding.zero1 import OwnedState, adamw_shares_step
from lightning_muon.optim.update.adamw import AdamWParameter, adamw_update
from lightning_muon.optim.update.muon import Here, Hooks, MuonParameter, muon_step, run, same_shape_batches
from lightning_muon.optim.update.options import AdamWOptions, MuonOptions
from lightning_muon.optim.update.state import States, state_tensor


def muon_group_step(group: Mapping[str, Any], plan: GroupPlan, states: States, hooks: Hooks) -> None:
    """Update the parameters of a muon group by one step; state that is missing in ``states`` is added."""
    options, params = cast("MuonOptions", group), group["params"]

    def parameter(index: int) -> MuonParameter:
        """Return this rank's elements of a parameter, their gradient and state."""
        name, param = group["param_names"][index], params[index]
        weight, gradient = _local(name, param, plan)
        momentum, mean_square = None, None
        if gradient is not None:
            momentum = _local_state(states, "momentum_buffer", param, plan, index)
            if options["neuron_beta"] is not None:
                mean_square = _local_state(states, "neuron_mean_square", param, plan, index)
        return MuonParameter(name, plan.layouts[index], plan.fans[index], weight, gradient, momentum, mean_square)

    moving = [p for p in map(parameter, plan.here) if p.gradient is not None]
    for batch in same_shape_batches(moving, options["batch_elements"]):
        run(muon_step(Here([batch], options, hooks)))
    for index in plan.everywhere:
        run(muon_step(Everywhere(params[index], parameter(index), options, hooks)))
    for transport, buckets in ((Owners, plan.buckets), (OwnedState, plan.zero1_buckets)):
        if buckets:
            batches = ((bucket, [parameter(i) for i in bucket.members]) for bucket in buckets)
            overlap(muon_step(transport(bucket, batch, options, hooks)) for bucket, batch in batches)


def adamw_group_step(group: Mapping[str, Any], plan: GroupPlan, states: States) -> None:
    """Update the parameters of an adamw group by one step; state that is missing in ``states`` is added."""
    options, params, names = cast("AdamWOptions", group), group["params"], group["param_names"]

    def parameter(index: int) -> AdamWParameter:
        """Return this rank's elements of a parameter, or all where its state is shared out, with gradient and state."""
        param = params[index]
        weight, gradient = _local(names[index], param, plan)
        if gradient is None:
            return AdamWParameter(weight, None, None)
        averages = [_local_state(states, name, param, plan, index) for name in ("exp_avg", "exp_avg_sq")]
        return AdamWParameter(weight, gradient, (averages[0], averages[1], state_tensor(states[param], "step", param)))

    adamw_update([parameter(index) for index in plan.here], options)
    if plan.zero1_packs:
        packs = (([parameter(i) for i in pack], [plan.shares[i] for i in pack]) for pack in plan.zero1_packs)
        overlap(adamw_shares_step(pack, shares, options) for pack, shares in packs)


def _local(name: str, param: Tensor, plan: GroupPlan) -> tuple[Tensor, Tensor | None]:
    """Return this rank's elements of a parameter and of its gradient; ``None`` without gradient or elements."""
    weight, gradient = local_tensor(param) if plan.has_dtensors else param, param.grad
    if gradient is None or param.numel() == 0:
        return weight, None
    if gradient.is_sparse:
        raise ValueError(f"{name} has a sparse gradient, which MuonAdamW cannot use: make its module sparse=False")
    return weight, local_gradient(param, gradient, name) if plan.has_dtensors else gradient


def _local_state(states: States, name: str, param: Tensor, plan: GroupPlan, index: int) -> Tensor:
    """Return this rank's elements of a state of a parameter."""
    elements = plan.shares[index].numel() if index in plan.shares else None
    state = state_tensor(states[param], name, param, elements)
    return local_tensor(state) if plan.has_dtensors else state
