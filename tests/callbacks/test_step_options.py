"""What a step takes is what its weights show."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.measures.weight_steps import StepOptions


def quiet_adamw(lr: Any) -> tuple[Optimizer, Tensor]:
    """Two groups that only decay moves, their gradient being zero; hooks raise that of the second for the step."""
    parameters = [torch.nn.Parameter(torch.full((2,), 1.0, dtype=torch.float64)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    groups = [{"params": [parameter], "weight_decay": 0.1} for parameter in parameters]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    optimizer.register_step_pre_hook(lambda o, *_: o.param_groups[1].update(weight_decay=0.5))
    optimizer.register_step_post_hook(lambda o, *_: o.param_groups[1].update(weight_decay=0.1))
    return optimizer, parameters[1].detach()


@pytest.mark.parametrize("in_closure", [True, False], ids=["automatic", "with a gradient scaler"])
@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_options_explain_the_decay(lr: float | Tensor, in_closure: bool) -> None:
    lr = lr.clone() if isinstance(lr, Tensor) else lr
    optimizer, weight = quiet_adamw(lr)
    made: list[StepOptions] = []

    def closure() -> float:
        made.append(StepOptions(optimizer))
        return 0.0

    if in_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    (options,) = made
    decayed = 1 - options.lr(1) * options.weight_decay(1)
    torch.testing.assert_close(weight, torch.full_like(weight, float(decayed)), rtol=1e-7, atol=0)
    assert options.weight_decay(0) == 0.1

    # What a scheduler does now belongs to the next step.
    if isinstance(lr, Tensor):
        lr.fill_(9.0)
    else:
        optimizer.param_groups[1]["lr"] = 9.0
    assert float(options.lr(1)) == 0.25
    options.close()
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_an_optimizer_may_have_neither() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    for group in optimizer.param_groups:
        del group["lr"], group["weight_decay"]
    options = StepOptions(optimizer)
    assert (options.lr(0), options.weight_decay(0)) == (1.0, 0.0)
