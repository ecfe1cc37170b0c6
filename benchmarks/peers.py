"""Other packages with Muon, on the same split into hidden matrices and other parameters.

``pip install 'lightning-muon[bench]'`` installs them; benchmarks skip those that are not installed.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from lightning_muon.optim import route_parameters


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that ``route_parameters`` assigns to Muon, and the others."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for group in route_parameters(model):
        (matrices if group["algorithm"] == "muon" else rest).extend(group["params"])
    return matrices, rest


def _pytorch_optimizer(model: nn.Module) -> list[torch.optim.Optimizer]:
    """https://github.com/kozistr/pytorch_optimizer."""
    from pytorch_optimizer import Muon  # noqa: PLC0415 - not everyone has it

    matrices, rest = split(model)
    groups = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
    return [Muon(groups, weight_decay=0.1, use_adjusted_lr=True)]


def _heavyball(model: nn.Module) -> list[torch.optim.Optimizer]:
    """https://github.com/HomebrewML/HeavyBall, which compiles its steps."""
    from heavyball import AdamW, Muon  # noqa: PLC0415 - not everyone has it

    matrices, rest = split(model)
    return [Muon(matrices, weight_decay=0.1), AdamW(rest)]


PEERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "pytorch_optimizer": _pytorch_optimizer,
    "heavyball": _heavyball,
}


def installed_peers() -> list[str]:
    """Return the names of the installed packages."""
    return [name for name in PEERS if find_spec(name)]
