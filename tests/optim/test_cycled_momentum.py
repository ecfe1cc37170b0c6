"""Schedulers that cycle the momentum: in a muon group ``betas[0]`` and ``momentum`` are one number."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_muon.optim import MuonAdamW, route_parameters

STEPS = 8
CYCLES: dict[str, Callable[..., Any]] = {
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=STEPS + 1),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.02, step_size_up=3),
}
Rates = list[tuple[float, float]]  # learning rate and momentum of each step


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    module(torch.randn(4, 6, generator=generator)).square().mean().backward()
    optimizer.step()


def rates_of(cycle: Callable[..., Any]) -> Rates:
    """What the scheduler gives an optimizer that only has ``betas``."""
    reference = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    scheduler = cycle(reference)
    rates: Rates = []
    for _ in range(STEPS):
        group = reference.param_groups[0]
        rates.append((group["lr"], group["betas"][0]))
        reference.step()
        scheduler.step()
    return rates


def both_names(optimizer: MuonAdamW) -> set[tuple[float, float]]:
    return {(g["momentum"], g["betas"][0]) for g in optimizer.param_groups if g["algorithm"] == "muon"}


@pytest.mark.parametrize("name", CYCLES)
def test_the_steps_are_those_of_a_momentum_set_by_hand(name: str) -> None:
    scheduled, by_hand = model(), model()
    optimizer, reference = MuonAdamW(route_parameters(scheduled)), MuonAdamW(route_parameters(by_hand))
    scheduler = CYCLES[name](optimizer)
    rates = rates_of(CYCLES[name])
    assert len({momentum for _, momentum in rates}) > 3
    for number, (lr, momentum) in enumerate(rates):
        step(scheduled, optimizer, number)
        scheduler.step()
        for group in reference.param_groups:
            group["lr"] = lr
            if group["algorithm"] == "muon":
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, 0.95)
        step(by_hand, reference, number)
        assert torch.equal(weights(scheduled), weights(by_hand))


def test_without_the_cycle_the_steps_are_others() -> None:
    moved = []
    for cycle_momentum in (True, False):
        module = model()
        optimizer = MuonAdamW([g for g in route_parameters(module) if g["algorithm"] == "muon"])
        scheduler = CYCLES["CyclicLR"](optimizer, cycle_momentum=cycle_momentum)
        for number in range(STEPS):
            step(module, optimizer, number)
            scheduler.step()
        moved.append(weights(module))
    assert not torch.equal(*moved)


def test_the_learning_rate_monitor_logs_what_acts(
    regression: Callable[..., LightningModule], fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    acted: list[dict[str, float]] = []

    def look(*_: object) -> None:
        acted.append({g["name"]: g["momentum"] if g["algorithm"] == "muon" else g["betas"][0] for g in groups})

    def configure(routed: list[dict[str, Any]]) -> dict[str, Any]:
        optimizer = MuonAdamW(routed)
        groups.extend(optimizer.param_groups)
        optimizer.register_step_pre_hook(look)
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    groups: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: object) -> None:
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.endswith("-momentum")})

    monitors = [LearningRateMonitor(log_momentum=True), Look()]
    fit(regression(configure), callbacks=monitors, logger=CSVLogger(tmp_path))
    assert len(acted) == 10
    for found, expected in zip(logged, acted, strict=True):
        assert found == pytest.approx({f"lr-MuonAdamW/{name}-momentum": value for name, value in expected.items()})
    assert logged[0] != logged[5]


def test_a_run_with_one_cycle_resumes_exactly(
    regression: Callable[..., LightningModule], fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    def configure(groups: list[dict[str, Any]]) -> dict[str, Any]:
        optimizer = MuonAdamW(groups)
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    straight, first, second = regression(configure), regression(configure), regression(configure, seed=9)
    end = fit(straight, max_epochs=2)
    fit(first, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(second, max_epochs=2, ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(weights(straight), weights(second))
    assert both_names(resumed.optimizers[0]) == both_names(end.optimizers[0])
    assert len({value for pair in both_names(end.optimizers[0]) for value in pair}) == 1


def reloaded(optimizer: MuonAdamW) -> MuonAdamW:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = MuonAdamW(route_parameters(model()), momentum=0.5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def pickled(optimizer: MuonAdamW) -> MuonAdamW:
    twin: MuonAdamW = pickle.loads(pickle.dumps(optimizer))  # noqa: S301 - it was written here
    return twin


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, pickled, reloaded])
def test_copies_keep_the_two_equal(again: Callable[[MuonAdamW], MuonAdamW]) -> None:
    optimizer = MuonAdamW(route_parameters(model()))
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    twin = again(optimizer)
    assert both_names(twin) == {(0.8, 0.8)}
    group = twin.param_groups[0]
    assert group["betas"] == (0.8, 0.99)
    group["momentum"] = 0.7
    assert group["betas"] == (0.7, 0.99)
    group.update(betas=[0.6, 0.98])
    assert (group["momentum"], group["betas"]) == (0.6, (0.6, 0.98))
    group |= {"momentum": 0.4, "betas": (0.3, 0.9)}
    assert (group["momentum"], group["betas"]) == (0.4, (0.4, 0.9))


def test_a_state_dict_has_plain_groups() -> None:
    saved = MuonAdamW(route_parameters(model())).state_dict()
    assert {type(group) for group in saved["param_groups"]} == {dict}


def test_of_a_checkpoint_in_which_they_differ_the_momentum_counts() -> None:
    saved = MuonAdamW(route_parameters(model())).state_dict()
    for group in saved["param_groups"]:
        group.update(betas=(0.9, 0.95), momentum=0.95)  # as in versions before the two were one
    optimizer = MuonAdamW(route_parameters(model()), momentum=0.5)
    optimizer.load_state_dict(saved)
    assert both_names(optimizer) == {(0.95, 0.95)}
    assert {g["betas"] for g in optimizer.param_groups if g["algorithm"] == "adamw"} == {(0.9, 0.95)}


def test_a_group_with_two_momenta_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"group 0 \(mine\): betas\[0\] is 0.8 and momentum is 0.95.*set momentum"):
        MuonAdamW([{"params": [weight], "algorithm": "muon", "name": "mine", "betas": (0.8, 0.99)}])
    both = {"params": [weight], "algorithm": "muon", "betas": [0.8, 0.99], "momentum": 0.8}
    assert both_names(MuonAdamW([both])) == {(0.8, 0.8)}
