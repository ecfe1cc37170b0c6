"""The whole training step of a GPT of GPT-2 small's size: its time beside AdamW's, and its peak memory."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measuring import Measuring
from benchmarks.gpu.subject import (
    GPT2_SMALL,
    TINY,
    MakeOptimizer,
    NextToken,
    fused_adamw,
    make_gpt,
    make_tokens,
    muon_adamw,
    preset,
    state_dtypes,
    state_megabytes,
)
from benchmarks.peak_memory import peak_memory
from benchmarks.stopwatch import seconds

REFERENCE = "torch AdamW, fused"
LR = 1e-4  # small: the optimizers take turns on the same weights
WARM_UP = 3  # steps; the first creates the state and may compile
ROUNDS = 12


class Training:
    """A GPT, its batches on the device, and steps with any optimizer of its parameters.

    Args:
        measuring: Says on which device and whether in tiny form.
        compiled: Whether the model runs through ``torch.compile``.
    """

    def __init__(self, measuring: Measuring, compiled: bool) -> None:
        self.device = measuring.device
        size = TINY if measuring.tiny else GPT2_SMALL
        memory = torch.cuda.mem_get_info()[1] / 2**30 if self.device == "cuda" else 0.0
        micro_batch = size.micro_batch(memory)
        self.batches = make_tokens(size, size.sequences // micro_batch, micro_batch, self.device)
        self.model = NextToken(make_gpt(size)).to(self.device)
        self.loss_of: Callable[[Tensor], Tensor] = torch.compile(self.model) if compiled else self.model
        self.tokens = size.sequences * size.context
        self.loss = torch.zeros(())

    def backward(self) -> None:
        """Accumulate the gradients of all batches, in bfloat16 autocast."""
        for tokens in self.batches:
            with torch.autocast(self.device, dtype=torch.bfloat16):
                self.loss = self.loss_of(tokens)
            (self.loss / len(self.batches)).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take one training step."""
        self.backward()
        optimizer.step()
        optimizer.zero_grad()

    def make(self, make_optimizer: MakeOptimizer) -> torch.optim.Optimizer:
        """Return an optimizer of the model, with the learning rate of this benchmark."""
        optimizer = make_optimizer(self.model)
        for group in optimizer.param_groups:
            group["lr"] = LR
        return optimizer

    def final_loss(self) -> float:
        """Return the loss of the last batch.

        Raises:
            ValueError: If it is not finite.
        """
        loss = float(self.loss.detach())
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
        return loss


def contestants() -> dict[str, MakeOptimizer]:
    """Return the optimizers to compare, the reference first."""
    return {REFERENCE: fused_adamw, "MuonAdamW": muon_adamw(), "fast": preset("fast"), **state_dtypes()}


def measure_training(measuring: Measuring) -> None:
    """Measure the training step, eager and compiled."""
    for model in measuring.each(["eager model", "compiled model"]):
        if model == "compiled model" and measuring.device != "cuda":
            measuring.skip(model, "no CUDA")
            continue
        _measure_model(measuring, model)
        measuring.free()


def _measure_model(measuring: Measuring, model: str) -> None:
    with measuring.row(f"{model}: warm-up") as row:
        training = Training(measuring, compiled=model == "compiled model")
        optimizers = {name: training.make(make) for name, make in contestants().items()}
        row["s"] = seconds(partial(_warm_up, training, optimizers), measuring.device)
    if "s" in row:
        _compare(measuring, model, training, optimizers)


def _warm_up(training: Training, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    for optimizer in optimizers.values():
        for _ in range(WARM_UP):
            training.step(optimizer)


def _compare(
    measuring: Measuring, model: str, training: Training, optimizers: dict[str, torch.optim.Optimizer]
) -> None:
    """Let the optimizers take turns on one model, then report each."""
    steps: dict[str, list[float]] = {name: [] for name in optimizers}
    updates: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(2 if measuring.tiny else ROUNDS):
        if number > 0 and measuring.seconds_left == 0:
            break
        for name, optimizer in optimizers.items():
            steps[name].append(seconds(partial(training.step, optimizer), measuring.device))
        training.backward()
        for name, optimizer in optimizers.items():
            updates[name].append(seconds(optimizer.step, measuring.device))
        training.model.zero_grad()
    for name in optimizers:
        with measuring.row(f"{model}: {name}") as row:
            ratios = [own / theirs for own, theirs in zip(steps[name], steps[REFERENCE], strict=True)]
            row.update(model=model, optimizer=name, rounds=len(ratios))
            row["step ms"] = 1e3 * statistics.median(steps[name])
            row["× AdamW's step"] = statistics.median(ratios)
            row["update ms"] = 1e3 * statistics.median(updates[name])
            row["tokens/s"] = training.tokens / statistics.median(steps[name])
            row["loss"] = training.final_loss()


def measure_memory(measuring: Measuring) -> None:
    """Measure the peak memory of the training step and the bytes of state, each optimizer with a model of its own."""
    reference: dict[str, Any] = {}
    makers = contestants()
    for name in measuring.each(makers):
        with measuring.row(name) as row:
            training = Training(measuring, compiled=False)
            optimizer = training.make(makers[name])
            for _ in range(2):
                training.step(optimizer)
            resting = torch.cuda.memory_allocated() / 2**20 if measuring.device == "cuda" else None
            peak = peak_memory(partial(training.step, optimizer), measuring.device)
            row["weights MB"] = sum(p.nbytes for p in training.model.parameters()) / 2**20
            row["state MB"] = state_megabytes(optimizer)
            reference = reference or row
            row["× AdamW's state"] = row["state MB"] / reference["state MB"]
            if resting is not None and peak is not None:
                row["at rest MB"], row["peak MB"] = resting, resting + peak / 2**20
            row["loss"] = training.final_loss()
            del training, optimizer
