"""A small GPT-like module with experts, trained on one device or spread over ranks, with monitors at every step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muon.callbacks import GradientMonitor, OrthogonalityMonitor
from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.strategies import FSDP2Strategy
from tests.callbacks.watched import Logged
from tests.on_ranks import FSDPOnCPU, fit

WIDTH, EXPERTS, STEPS, BATCH = 8, 4, 4, 8
LR, MOMENTUM = 0.01, 0.9
muon = partial(
    MuonAdamW,
    lr=LR,
    momentum=MOMENTUM,
    weight_decay=0.0,
    update_scale="none",
    orthogonalizer_options={"dtype": "float64"},
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed: Tensor = self.out(torch.softmax(q @ k.mT, -1) @ v)
        return mixed


class Experts(nn.Module):
    """A stack of experts; each place in the sequence has one, and none has the last."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = False
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(x.shape[1]) % (EXPERTS - 1)
        hidden = torch.einsum("btd,thd->bth", x, self.up[chosen]).tanh()
        return torch.einsum("bth,tdh->btd", hidden, self.down[chosen])


class ListOfExperts(nn.Module):
    """As many experts in a list, all of which see all tokens, the first of them twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(1 + (i == 0)) * expert(x) for i, expert in enumerate(self.experts)]).mean(0)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        added: Tensor = x + self.mlp(x)
        return added


class Mixing(LightningModule):
    def __init__(self, make_optimizer: Callable[..., Any] = muon) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = nn.ModuleList([Block(Experts()), Block(ListOfExperts()), Block(Experts())])
        self.net = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(WIDTH, 3)}).double()
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for block in self.net["blocks"]:  # type: ignore[union-attr]
            batch = block(batch)
        loss: Tensor = self.net["head"](batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(route_parameters(self))

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(STEPS, BATCH, 6, WIDTH, generator=generator, dtype=torch.float64)
        mine = rows.chunk(self.trainer.world_size, dim=1)[self.trainer.global_rank]
        return DataLoader(list(mine), batch_size=None)  # type: ignore[arg-type]


WAYS: dict[str, tuple[Callable[[], Strategy | str], Callable[..., Any]]] = {
    "one": (lambda: "auto", muon),
    "ddp": (lambda: DDPStrategy(process_group_backend="gloo"), muon),
    "ddp_sharded_state": (lambda: DDPStrategy(process_group_backend="gloo"), partial(muon, shard_state=True)),
    "fsdp2": (FSDP2Strategy, muon),
    "fsdp": (lambda: FSDPOnCPU(auto_wrap_policy={ListOfExperts}), muon),
}


def find(*ways: str) -> dict[str, list[dict[str, float]]]:
    """Train in each way, on every rank alike."""
    found = {}
    for way in ways:
        strategy, make_optimizer = WAYS[way]
        logged = Logged("operator_error", "needed_steps", "expert_balance")
        callbacks = [OrthogonalityMonitor(1), GradientMonitor(1, per_parameter=True), logged]
        fit(Mixing(make_optimizer), strategy, STEPS, callbacks)
        found[way] = logged.steps
    return found


def needed(sigma: float) -> int:
    """How often the classic quintic is applied until abs(σ² − 1) ≤ 0.7."""
    steps = 0
    while abs(sigma**2 - 1) > 0.7 or steps == 0:
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
        steps += 1
    return steps


def exact(matrix: Tensor) -> tuple[float, int]:
    """The orthogonality error that five steps of the classic quintic leave, and the steps that the smallest σ needs."""
    sigma = torch.linalg.svdvals(matrix) / matrix.norm()
    lifted = sigma
    for _ in range(5):
        lifted = 3.4445 * lifted - 4.7750 * lifted**3 + 2.0315 * lifted**5
    # Where float64 has no rank, float32's resolution is the smallest: at a condition number of 1e7.
    smallest = max(float(sigma[-1]), float(sigma[0]) * 1e-7)
    return math.sqrt(float((lifted**2 - 1).square().mean())), needed(smallest)
