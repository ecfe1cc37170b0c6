"""The learning rate follows its formula, from the first step to past the last, and over a resume."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD

from lightning_muon.optim import OneCycle, WarmupCosine, WarmupStableDecay


def optimizer() -> SGD:
    return SGD([{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 0.5}])


def rates(schedule: Any, count: int, own: SGD | None = None) -> list[float]:
    """The rate in each step of the first group; the second keeps its ratio."""
    own = own or optimizer()
    scheduler, found = schedule(own), []
    for _ in range(count):
        found.append(own.param_groups[0]["lr"] / 2.0)
        for group in own.param_groups[1:]:
            assert group["lr"] == pytest.approx(own.param_groups[0]["lr"] / 4)
        own.step()
        scheduler.step()
    return found


def test_warmup_and_cosine() -> None:
    found = rates(partial(WarmupCosine, total_steps=100, warmup=0.1, floor=0.2), 120)
    assert found[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    cosine = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * step / 90)) for step in range(90)]
    assert found[10:100] == pytest.approx(cosine)
    assert found[100:] == pytest.approx([0.2] * 20)
    plain = rates(partial(WarmupCosine, total_steps=50, warmup=0.0), 50)
    theirs = rates(partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=50), 50)
    assert plain == pytest.approx(theirs)


def test_warmup_plateau_and_decay() -> None:
    found = rates(partial(WarmupStableDecay, total_steps=100, warmup=0.05, decay=0.2, floor=0.1), 110)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:80] == [1.0] * 75
    assert found[80:100] == pytest.approx([0.1 + 0.9 * (100 - step) / 20 for step in range(80, 100)])
    assert found[100:] == pytest.approx([0.1] * 10)
    # Before the decay the length does not matter.
    short, long = (WarmupStableDecay(optimizer(), total, 5 / total) for total in (100, 200))
    assert [short.lr_lambdas[0](step) for step in range(80)] == [long.lr_lambdas[0](step) for step in range(80)]


def test_one_cycle_to_the_rate_of_each_group() -> None:
    """In torch's form for one group, momentum included, over exactly the steps of the run."""
    own = SGD([{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 0.5}], momentum=0.9)
    found = rates(partial(OneCycle, total_steps=40), 40, own)
    reference = SGD([torch.zeros(1)], momentum=0.9)
    theirs = rates(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=2.0, total_steps=40), 40, reference)
    assert found == theirs
    assert max(found) == pytest.approx(1.0, rel=1e-3)
    assert found[-1] == pytest.approx(1 / 25e4)
    assert own.param_groups[0]["momentum"] == own.param_groups[1]["momentum"] == reference.param_groups[0]["momentum"]


@pytest.mark.parametrize("schedule", [WarmupCosine, WarmupStableDecay, OneCycle])
def test_without_the_command_line_the_length_must_be_given(schedule: Any) -> None:
    with pytest.raises(ValueError, match="total_steps must be given"):
        schedule(optimizer())


def test_a_resumed_schedule_goes_on() -> None:
    first, second = optimizer(), optimizer()
    schedule = partial(WarmupStableDecay, total_steps=20, warmup=0.2, decay=0.5)
    scheduler, resumed = schedule(first), schedule(second)
    for _ in range(12):
        first.step()
        scheduler.step()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(5):
        for one, its in ((first, scheduler), (second, resumed)):
            one.step()
            its.step()
        assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": -1}, "total_steps must be at least 1, got -1"),
        ({"warmup": 1.5}, "warmup must be from 0 to 1, got 1.5"),
        ({"floor": math.nan}, "floor must be from 0 to 1, got nan"),
        ({"warmup": 0.6, "decay": 0.5}, "warmup and decay must be at most 1 together, got 1.1"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(optimizer(), **{"total_steps": 10, **options})  # type: ignore[arg-type]
