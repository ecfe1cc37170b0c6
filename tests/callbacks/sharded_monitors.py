"""The same training with all monitors, spread over the ranks in several ways."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader

from lightning_muon.callbacks import (
    AutoWeightDecay,
    GradientMonitor,
    OptimizerTimeMonitor,
    OrthogonalityMonitor,
    UpdateRMSMonitor,
    WeightRMSMonitor,
)
from lightning_muon.callbacks.measures.singular_values import LARGEST_CONDITION
from lightning_muon.callbacks.shards import whole
from lightning_muon.optim import MuonAdamW, Rule, find_routes
from lightning_muon.optim.routing.routing import grouped
from lightning_muon.strategies import FSDP2Strategy
from tests.callbacks.watched import watched
from tests.on_ranks import FSDPOnCPU, fit

STEPS, GLOBAL_BATCH = 6, 12


class Uneven(LightningModule):
    """In float64, so that all ways see the same numbers; two rows, or seven, do not divide among three ranks.

    Args:
        make_optimizer: From parameter groups.
        nan_at: The step whose gradient is spoilt, on the last rank alone if that holds its own part of it.
    """

    def __init__(self, make_optimizer: Callable[..., Any], nan_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)]
        self.net = nn.Sequential(*layers).double()
        self.attention = nn.MultiheadAttention(7, 1, bias=False, batch_first=True).double()
        self.make_optimizer = make_optimizer
        self.nan_at = nan_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.net[:4](batch)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        loss: Tensor = self.net[4:](x).square().mean()
        return loss

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == self.nan_at:
            gradient = next(
                p.grad for name, p in self.named_parameters() if name.endswith("2.weight") and "net" in name
            )
            if gradient is not None:
                gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                gradient.view(-1)[-1:] = torch.nan

    def configure_optimizers(self) -> Any:
        # The output layer is one more hidden matrix here.
        routes = find_routes(self, [Rule("net.6.weight", "muon")])
        return self.make_optimizer(
            grouped(replace(route, role="matrix") if route.role == "head" else route for route in routes)
        )

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randn(STEPS, GLOBAL_BATCH, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        mine = rows.chunk(self.trainer.world_size, dim=1)[self.trainer.global_rank]
        return DataLoader(list(mine), batch_size=None)  # type: ignore[arg-type]


class Metrics(Callback):
    """What is logged at each step, and what it should be, computed on whole weights."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.expected: list[dict[str, float]] = []
        self.before: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        parameters = {name: p for name, p in pl_module.named_parameters() if p.ndim == 2 and p.grad is not None}
        self.gradients = {name: whole_tensor(p.grad).clone() for name, p in parameters.items() if p.grad is not None}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before = {name: elements.clone() for name, elements in whole_weights(pl_module).items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in watched(trainer).items()})
        self.expected.append({})
        for name, elements in whole_weights(pl_module).items():
            self.expected[-1][f"weight_rms/{name}"] = float(elements.square().mean().sqrt())
            self.expected[-1][f"weight_absmax/{name}"] = float(elements.abs().max())
            old, update = self.before[name], elements - self.before[name]
            rms = old.square().mean().sqrt()
            headroom = update.square().mean().sqrt() / 2.0 ** (rms.log2().floor() - 7)
            self.expected[-1][f"bf16_headroom/{name}"] = float(headroom)
            stays = (old.bfloat16().float() + update.float()).bfloat16() == old.bfloat16()
            self.expected[-1][f"lost_updates/{name}"] = float(stays.double().mean())
        self.expected[-1] |= self.expected_updates(trainer, pl_module)
        self.expected[-1] |= anisotropy("gradient", self.gradients)
        states = {name: trainer.optimizers[0].state[p] for name, p in pl_module.named_parameters() if p.ndim == 2}
        momenta = {name: state.get("momentum_buffer", state.get("exp_avg")) for name, state in states.items()}
        # With a sharded state no rank has more than a flat part of some.
        momenta = {name: whole_tensor(momentum) for name, momentum in momenta.items() if momentum is not None}
        self.expected[-1] |= anisotropy("momentum", {n: m for n, m in momenta.items() if m.ndim == 2})

    def expected_updates(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The RMS of U in W' = (1 − ηλ)W − ηU, with the decay that was logged, of parameters and of sampled groups."""
        expected: dict[str, float] = {}
        after = whole_weights(pl_module)
        names = {id(p): name.replace("_fsdp_wrapped_module.", "") for name, p in pl_module.named_parameters()}
        for group in trainer.optimizers[0].param_groups:
            decay = float(watched(trainer).get(f"weight_decay/{group['name']}", group["weight_decay"]))
            sampled = []
            for name in (names[id(p)] for p in group["params"]):
                update = ((1 - group["lr"] * decay) * self.before[name] - after[name]) / group["lr"]
                expected[f"parameter_update_rms/{name}"] = float(update.square().mean().sqrt())
                if f"parameter_update_rms/{name}" in watched(trainer):
                    sampled.append(update)
            if sampled:
                expected[f"update_rms/{group['name']}"] = float(torch.cat(sampled).square().mean().sqrt())
        return expected


def anisotropy(kind: str, matrices: dict[str, Tensor]) -> dict[str, float]:
    """Condition number and stable rank; the worst of the three blocks of a fused projection."""
    expected = {}
    for name, matrix in matrices.items():
        if matrix.isfinite().all():
            values = [torch.linalg.svdvals(block) for block in matrix.chunk(3 if "in_proj" in name else 1)]
            condition = max(min(float(v[0] / v[-1]), LARGEST_CONDITION) for v in values)
            stable_rank = min(float((v / v[0]).square().sum()) for v in values)
        else:
            condition = stable_rank = math.nan
        expected |= {f"{kind}_condition_log10/{name}": math.log10(condition), f"{kind}_stable_rank/{name}": stable_rank}
    return expected


def whole_tensor(tensor: Tensor) -> Tensor:
    """With the shards of all ranks, of a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(module: LightningModule) -> dict[str, Tensor]:
    """All elements of the parameters, on every rank."""
    parts = {}
    for name, p in module.named_parameters():
        parts[name.replace("_fsdp_wrapped_module.", "")] = whole_tensor(p).detach().flatten()
    if not isinstance(module.trainer.strategy, FSDPOnCPU):
        return parts
    everywhere: list[dict[str, Tensor]] = [{}] * module.trainer.world_size
    torch.distributed.all_gather_object(everywhere, parts)
    return {name: torch.cat([held[name] for held in everywhere]) for name in parts}


class NormalizingMuon(torch.optim.Optimizer):
    """Hands nothing out; its steps are whole gradients of one size."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.05, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        loss = torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"] if group["algorithm"] == "muon" else ():
                gradient = whole(p.grad)
                update = 3.0 * gradient / gradient.norm()
                if isinstance(p, DTensor):
                    update = distribute_tensor(update, p.device_mesh, p.placements)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
        return loss


muon = partial(MuonAdamW, lr=0.05, weight_decay=0.0, orthogonalizer_options={"dtype": "float64"})
WAYS: dict[str, tuple[Callable[[], Strategy | str], Callable[..., Any]]] = {
    "one": (lambda: "auto", muon),
    "ddp": (lambda: DDPStrategy(process_group_backend="gloo"), muon),
    "ddp_sharded_state": (lambda: DDPStrategy(process_group_backend="gloo"), partial(muon, shard_state=True)),
    "fsdp2": (FSDP2Strategy, muon),
    "hsdp": (lambda: FSDP2Strategy(replicate_size=2), muon),
    "fsdp": (lambda: FSDPOnCPU(auto_wrap_policy={nn.MultiheadAttention}), muon),
    "foreign": (lambda: "auto", NormalizingMuon),
    "foreign_ddp": (lambda: DDPStrategy(process_group_backend="gloo"), NormalizingMuon),
    "foreign_fsdp2": (FSDP2Strategy, NormalizingMuon),
    "adamw": (lambda: "auto", partial(torch.optim.AdamW, lr=0.05)),
    "adamw_fsdp2": (FSDP2Strategy, partial(torch.optim.AdamW, lr=0.05)),
}


def fit_in(way: str, callbacks: list[Callback], nan_at: int | None = None, **options: Any) -> None:
    strategy, make_optimizer = WAYS[way]
    fit(Uneven(partial(make_optimizer, **options), nan_at), strategy, STEPS, callbacks)


def monitors(every: int, every_decision: int) -> list[Callback]:
    return [
        WeightRMSMonitor(every, per_parameter=True, sample=3, outputs=["net.*", "attention"], as_if_bf16=True),
        OrthogonalityMonitor(every, per_parameter=True),
        UpdateRMSMonitor(every, per_parameter=True, sample=3),
        GradientMonitor(every, per_parameter=True, sample=4),
        OptimizerTimeMonitor(every),
        AutoWeightDecay(limit=0.39, release=0.5, ramp_steps=3, every_n_steps=every_decision),
    ]


def run(way: str, nan_at: int | None = None) -> dict[str, list[dict[str, float]]]:
    metrics = Metrics()
    fit_in(way, [*monitors(2, 1), metrics], nan_at)
    return {"logged": metrics.steps, "expected": metrics.expected}


def steer(way: str, options: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The decays that steer to a target, and the weights that came of it."""
    metrics = Metrics()
    auto = AutoWeightDecay(horizon=20, ramp_steps=2, bounds=(0.0, 50.0), every_n_steps=1, **options)
    fit_in(way, [auto, metrics], lr=0.01)  # the end of bf16 headroom is among the weights
    kept = auto.state_dict()["sets"]
    sets = [{f"{key}/{name}": kept[name][key] for name in kept for key in ("decay", "growth", "rms")}]
    return {"logged": metrics.steps, "expected": metrics.expected, "sets": sets}


STEERED = {
    "to a number": {"target_rms": 0.2},
    "to the end of bf16, each matrix": {"target_rms": "bf16", "per": "matrix"},
}


def collectives(way: str, callbacks: list[Callback]) -> Counter[str]:
    """How often each collective is called in a run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fit_in(way, callbacks)
    # As key_averages() counts, which takes seconds for all the other events.
    names = (event.name() for event in profile.profiler.kineto_results.events())
    return Counter(name for name in names if name.startswith("c10d::"))


def find(*ways: str) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Train in each way, on every rank alike; returns what is logged and what it should be, by way and kind of run."""
    found = {}
    for way in ways:
        found[way] = run(way)
        found[f"{way} with NaN"] = run(way, nan_at=STEPS - 1)
        if way in {"one", "ddp", "fsdp2", "fsdp"}:
            found |= {f"{way} {aim}": steer(way, options) for aim, options in STEERED.items()}
        if way in {"ddp", "fsdp2", "foreign_fsdp2"} and torch.distributed.get_world_size() == 2:
            never, always = (collectives(way, monitors(every, every)) for every in (STEPS + 1, 1))
            assert never == collectives(way, []) != always, f"{way}: collectives of monitors that measure nothing"
            steering = AutoWeightDecay("bf16", per="matrix", every_n_steps=STEPS + 1)
            assert never == collectives(way, [steering]), f"{way}: collectives of a target between measurements"
    return found
