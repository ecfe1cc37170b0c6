"""Automatic weight decay and what a step may be: of few matrices, with coupled decay, at rates of all kinds, nested."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_muon.callbacks import AutoWeightDecay
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]


def test_what_rests_does_not_count(regression: Module, fit: Fit) -> None:
    """A large matrix without gradient beside two that grow: these come to the target, as they do alone."""

    class WithFrozen(regression):  # type: ignore[valid-type,misc]
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.frozen = torch.nn.Linear(16, 16, bias=False)
            torch.nn.init.ones_(self.frozen.weight)
            self.head = torch.nn.Linear(4, 1)  # an output head after it, so that it counts as hidden

    def held(kind: Any) -> float:
        module = kind(partial(torch.optim.AdamW, lr=0.05, weight_decay=0.0))
        target = AutoWeightDecay(target_rms=0.3, horizon=20, ramp_steps=10, bounds=(0.0, 4.0), every_n_steps=5)
        fit(module, callbacks=[target], max_epochs=40)
        weights = [module.net[0].weight, module.net[2].weight, module.net[4].weight]
        groups = module.trainer.optimizers[0].param_groups[0]["params"]
        moving = torch.cat([w.detach().flatten() for w in weights if any(w is p for p in groups)])
        return float(moving.square().mean().sqrt())

    assert held(WithFrozen) == pytest.approx(0.3, rel=0.1)


def test_coupled_decay_is_refused(regression: Module, fit: Fit) -> None:
    module = regression(partial(torch.optim.SGD, lr=0.1, weight_decay=0.1))
    with pytest.raises(MisconfigurationException, match="but SGD adds that of its group 'matrix' to the gradient"):
        fit(module, callbacks=[AutoWeightDecay(target_rms=0.3)])


def test_rates_that_are_tensors_and_numbers(regression: Module, fit: Fit) -> None:
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        first, second = (dict(groups[0]), dict(groups[0]))
        for key in ("params", "param_names", "reasons", "layouts", "shardings"):
            if key in groups[0]:
                first[key], second[key] = groups[0][key][:1], groups[0][key][1:]
        first |= {"lr": torch.tensor(0.02), "name": "one"}
        return torch.optim.AdamW([first, {**second, "lr": 0.02, "name": "two"}])

    auto = AutoWeightDecay(target_rms=0.1, per="matrix", horizon=5, ramp_steps=2, bounds=(0.0, 9.0))
    trainer = fit(regression(make), callbacks=[auto], max_epochs=3)
    assert float(watched(trainer)["weight_decay/one"]) > 0


def test_a_step_that_calls_that_of_its_parent_is_one(regression: Module, fit: Fit) -> None:
    """torch runs the hooks of both once any optimizer of the parent's kind was made."""

    class Derived(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    taken: dict[Any, Any] = {}
    for kind in (torch.optim.AdamW, Derived):
        auto = AutoWeightDecay(target_rms=0.1, ramp_steps=20, horizon=5, bounds=(0.0, 9.0))
        fit(regression(partial(kind, lr=0.02, weight_decay=0.1)), callbacks=[auto], max_epochs=2)
        taken[kind] = auto.state_dict()
    assert taken[Derived] == taken[torch.optim.AdamW]
