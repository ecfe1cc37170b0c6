"""Attention logits and QK-clip, spread over the ranks in several ways."""

from collections.abc import Callable
from typing import Any

import torch
from attending import Fused, NextToken, Plain
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_muon.callbacks import AttentionLogitMonitor, QKClip
from lightning_muon.strategies import FSDP2Strategy
from tests.callbacks.watched import Logged
from tests.on_ranks import FSDPOnCPU, fit

STEPS = 5


class Net(nn.Module):
    """Both forms of weights; one attention comes in the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.plain, self.late = Fused(), Plain(depth=1), Fused()
        self.passes = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.passes += 1
        logits: Tensor = self.fused(tokens) + self.plain(tokens)
        if self.passes > 2:
            logits = logits + self.late(tokens)
        return logits


WAYS: dict[str, Callable[[], Strategy | str]] = {
    "one": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
    "fsdp2": FSDP2Strategy,
    "fsdp": lambda: FSDPOnCPU(auto_wrap_policy={nn.MultiheadAttention}),
}


def fit_in(way: str, callbacks: list[Callback]) -> None:
    module = NextToken(Net, lambda net: torch.optim.SGD(net.parameters(), 0.5), steps=STEPS)
    fit(module, WAYS[way], STEPS, callbacks, log_every_n_steps=1)


def find(*ways: str) -> dict[str, Any]:
    """Train in each way with a clip that acts in each step; returns what is logged, or the error."""
    found: dict[str, Any] = {}
    for way in ways:
        monitor = AttentionLogitMonitor(per_parameter=True, queries=None, max_logit=None)
        logged = Logged()
        fit_in(way, [monitor, logged])
        found[way] = logged.steps
        logged = Logged()
        try:
            fit_in(way, [QKClip(0.1), monitor, logged])
        except MisconfigurationException as error:
            found[f"{way} clipped"] = str(error)
        else:
            found[f"{way} clipped"] = logged.steps
    return found
