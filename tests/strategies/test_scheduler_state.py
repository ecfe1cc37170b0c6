"""Schedules go on at the same learning rates in other parameter groups."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.strategies import follow_groups
from tests.earlier_groups import earlier_groups

STEPS, SAVED_AT = 8, 3


def warmed_up(optimizer: Optimizer) -> torchs.LRScheduler:
    parts = [torchs.LinearLR(optimizer, 0.1, total_iters=5), torchs.CosineAnnealingWarmRestarts(optimizer, 2)]
    return torchs.SequentialLR(optimizer, parts, milestones=[5])


def chained(optimizer: Optimizer) -> torchs.LRScheduler:
    return torchs.ChainedScheduler([torchs.ConstantLR(optimizer, 0.5, 4), torchs.ExponentialLR(optimizer, 0.9)])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": partial(torchs.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "cosine": partial(torchs.CosineAnnealingLR, T_max=3),  # restarts: its base rates count
    "restarts": partial(torchs.CosineAnnealingWarmRestarts, T_0=3),
    "one cycle": partial(torchs.OneCycleLR, max_lr=0.1, total_steps=STEPS + 1, cycle_momentum=False),
    "cyclic": partial(torchs.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False),
    "sequential": warmed_up,
    "chained": chained,
    "plateau": partial(torchs.ReduceLROnPlateau, patience=0, min_lr=1e-5),
}


def go(optimizer: Optimizer, scheduler: Any, steps: int) -> list[dict[str, float]]:
    """Take steps; return the learning rate of each parameter in each of them."""
    found = []
    for _ in range(steps):
        found.append({name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]})
        optimizer.step()
        if isinstance(scheduler, torchs.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return found


def model() -> nn.Module:
    """It has an embedding, hidden matrices, vectors before and after them, and a head."""
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7))


@pytest.mark.parametrize("by_state_dict", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_at_the_same_rates(name: str, by_state_dict: bool) -> None:
    options = {"lr": 0.02, "adamw_lr": 0.005}
    network = model()
    straight = MuonAdamW(route_parameters(network), **options)
    expected = go(straight, SCHEDULERS[name](straight), STEPS)

    first = MuonAdamW(earlier_groups(route_parameters(network), backwards=True), **options)
    scheduler = SCHEDULERS[name](first)
    found = go(first, scheduler, SAVED_AT)
    second = MuonAdamW(route_parameters(network), **options)
    assert len(second.param_groups) > len(first.param_groups)
    resumed, state = SCHEDULERS[name](second), scheduler.state_dict()
    second.load_state_dict(first.state_dict())
    if by_state_dict:  # as FSDP2Strategy, which loads the optimizer before Lightning loads the scheduler
        follow_groups(state, second.param_groups)
        resumed.load_state_dict(state)
    else:
        resumed.load_state_dict(state)
        follow_groups(resumed, second.param_groups)
    assert found + go(second, resumed, STEPS - SAVED_AT) == expected


def test_groups_in_another_order_keep_their_rates() -> None:
    network = model()
    first = MuonAdamW(earlier_groups(route_parameters(network)), lr=0.02, adamw_lr=0.005)
    backwards = MuonAdamW(earlier_groups(route_parameters(network), backwards=True), lr=0.02, adamw_lr=0.005)
    scheduler = torchs.LambdaLR(first, lambda step: 1 / (1 + step))
    resumed = torchs.LambdaLR(backwards, lambda step: 1 / (1 + step))
    backwards.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    follow_groups(resumed, backwards.param_groups)
    expected = go(first, scheduler, 3)
    assert go(backwards, resumed, 3) == expected
    assert resumed.base_lrs == [0.005, 0.005, 0.02]


def test_settings_that_differ_between_the_groups_are_refused() -> None:
    network = model()
    first = MuonAdamW(earlier_groups(route_parameters(network)))
    state = torchs.ReduceLROnPlateau(first, min_lr=[0.1, 0.2, 0.3]).state_dict()
    with pytest.raises(ValueError, match=r"min_lrs of the scheduler is \[0.1, 0.2, 0.3\] in the checkpoint, .* has 4"):
        follow_groups(state, MuonAdamW(route_parameters(network)).param_groups)


def test_what_was_saved_in_the_same_groups_stays() -> None:
    """Also base rates that a user has set."""
    optimizer = MuonAdamW(route_parameters(model()))
    scheduler = torchs.LambdaLR(optimizer, lambda _: 1.0)
    scheduler.base_lrs = [0.1, 0.2, 0.3, 0.4]
    follow_groups(scheduler, optimizer.param_groups)
    assert scheduler.base_lrs == [0.1, 0.2, 0.3, 0.4]
