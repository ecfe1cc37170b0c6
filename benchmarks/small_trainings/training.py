"""A training of one task with one optimizer, and the sweep of its learning rate."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_muon.optim import MuonAdamW, Rule, route_parameters

WARMUP = 0.05  # the part of the steps in which the learning rate rises; then it falls to zero, linearly
WEIGHT_DECAY = 0.01
FACTOR = 2.0  # between two learning rates of a sweep
FIRST_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # of both optimizers
MOST_RATES = 14  # of a sweep; a best rate that is still at an end is an error
SWEEP_SEEDS, SEEDS = (0, 4), (1, 2, 3)
STUDENT = 2.776  # 97.5 % quantile of Student's t with 4 degrees of freedom: two times three seeds

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained, and how it is judged.

    Args:
        name: As in the table.
        model: Makes the model; the global random number generator has been seeded.
        losses: For each optimizer that takes turns, the part of the model that it updates (``None``: all), and the loss
            on a batch that is drawn with the generator.
        evaluate: The loss on held-out data; lower is better.
        steps: Number of steps, of each optimizer.
        betas: AdamW's; Muon's momentum, if it is not 0.95.
        momentum: Muon's.
        rules: Rules of routing, for the groups of both optimizers.
        noisy: Whether the learning rate is chosen by the mean of two seeds, not by one.
        watch: What else is measured of the trained model, not by which the learning rate is chosen.
    """

    name: str
    model: Callable[[], nn.Module]
    losses: dict[str | None, Loss]
    evaluate: Callable[[nn.Module], float]
    steps: int
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    rules: Sequence[Rule] = ()
    noisy: bool = False
    watch: Callable[[nn.Module], float] | None = None


def adamw(task: Task, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """AdamW for all parameters; those groups that are not to decay do not."""
    own = [{"params": g["params"], "weight_decay": g.get("weight_decay", WEIGHT_DECAY)} for g in groups]
    return torch.optim.AdamW(own, lr=lr, betas=task.betas, fused=True)


def muon(task: Task, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """``MuonAdamW`` with its defaults: one learning rate for both algorithms."""
    return MuonAdamW(groups, lr=lr, weight_decay=WEIGHT_DECAY, betas=task.betas, momentum=task.momentum)


OPTIMIZERS = {"AdamW": adamw, "MuonAdamW": muon}


def train(
    task: Task, optimizer: str, lr: float, seed: int, after: Callable[[nn.Module], object] | None = None
) -> float:
    """Train a task to the end of its schedule, and return the held-out loss; infinite if it diverged.

    Args:
        task: The task.
        optimizer: A key of :data:`OPTIMIZERS`.
        lr: The peak learning rate.
        seed: Of the weights and the batches.
        after: Called with the trained model.
    """
    torch.manual_seed(seed)
    model = task.model()
    generator = torch.Generator().manual_seed(seed)
    turns = []
    for part, loss in task.losses.items():
        updated = None if part is None else model.get_submodule(part)
        made = OPTIMIZERS[optimizer](task, route_parameters(model, task.rules, part=updated), lr)
        turns.append((made, LambdaLR(made, lambda step: _schedule(step / task.steps)), loss))
    for _ in range(task.steps):
        for made, schedule, loss in turns:
            value = loss(model, generator)
            if not math.isfinite(float(value.detach())):
                return math.inf
            made.zero_grad()
            value.backward()
            made.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        judged = task.evaluate(model)
    if after is not None:
        after(model)
    return judged if math.isfinite(judged) else math.inf


def _schedule(progress: float) -> float:
    return min((progress + 1e-3) / WARMUP, (1 - progress) / (1 - WARMUP))


@dataclass
class Result:
    """What a sweep found.

    Args:
        optimizer: Its name.
        sweep: The held-out loss of each learning rate, with the seeds of the sweep.
        losses: Those of the other seeds, at the best learning rate.
        watched: What ``watch`` of the task measured of these.
    """

    optimizer: str
    sweep: dict[float, float]
    losses: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The learning rate with the lowest loss."""
        return min(self.sweep, key=lambda lr: self.sweep[lr])

    @property
    def mean(self) -> float:
        """The mean loss of the seeds."""
        return statistics.mean(self.losses)

    @property
    def variance(self) -> float:
        """The variance of the mean."""
        return statistics.variance(self.losses) / len(self.losses)


def swept(run: Callable[[float], float], rates: Sequence[float] = FIRST_RATES) -> dict[float, float]:
    """Return the loss of each learning rate; rates are added as long as the best is the lowest or the highest.

    Raises:
        ValueError: If the best is still at an end after :data:`MOST_RATES` rates.
    """
    found = {lr: run(lr) for lr in rates}
    while True:
        ordered = sorted(found)
        best = min(ordered, key=lambda lr: found[lr])
        if best not in (ordered[0], ordered[-1]):
            return dict(sorted(found.items()))
        if len(found) >= MOST_RATES:
            raise ValueError(f"the best learning rate is at an end of {ordered}")
        # Where all diverge, the first is taken for the best, and lower ones are tried.
        further = ordered[0] / FACTOR if best == ordered[0] else ordered[-1] * FACTOR
        found[further] = run(further)


def compared(task: Task, optimizers: Sequence[str] = tuple(OPTIMIZERS), quick: bool = False) -> list[Result]:
    """Sweep the learning rate of each optimizer on a task, and train with the other seeds at the best.

    Args:
        task: The task.
        optimizers: Keys of :data:`OPTIMIZERS`.
        quick: One learning rate and no sweep, to check that it runs.
    """
    results = []
    for name in optimizers:
        run = partial(_mean_loss, task, name)
        result = Result(name, {FIRST_RATES[1]: run(FIRST_RATES[1])} if quick else swept(run))
        for seed in SEEDS[: 2 if quick else None]:
            watch = None if task.watch is None else lambda m, r=result, w=task.watch: r.watched.append(w(m))
            result.losses.append(train(task, name, result.best, seed, watch))
        print(f"{task.name}, {name}: lr {result.best:g}, {result.losses}, sweep {result.sweep}", flush=True)
        results.append(result)
    return results


def _mean_loss(task: Task, optimizer: str, lr: float) -> float:
    """Train with the seeds of a sweep."""
    seeds = SWEEP_SEEDS if task.noisy else SWEEP_SEEDS[:1]
    return statistics.mean(train(task, optimizer, lr, seed) for seed in seeds)


def gain(reference: Result, other: Result) -> tuple[float, float]:
    """Return by how much the loss of the other is lower, and half the width of its 95 % interval."""
    return reference.mean - other.mean, STUDENT * math.sqrt(reference.variance + other.variance)


def verdict(reference: Result, other: Result) -> str:
    """Say which is better, if the interval excludes that they are equal."""
    difference, half = gain(reference, other)
    if abs(difference) <= half:
        return "no difference"
    return f"{(other if difference > 0 else reference).optimizer} better"
