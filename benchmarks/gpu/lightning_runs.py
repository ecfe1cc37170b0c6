"""Runs under Lightning: the monitors' cost and host syncs, and the sharding strategies on one device."""

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from inspect import signature
from typing import Any

import lightning as L  # noqa: N812 - the name that everyone knows
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_muon.strategies  # noqa: F401 - registers fsdp2
from benchmarks.gpu.measuring import Measuring, SkippedError
from benchmarks.gpu.subject import (
    GPT2_SMALL,
    TINY,
    NextToken,
    Size,
    configured,
    imported,
    make_gpt,
    make_tokens,
    read_config,
)
from benchmarks.turns import IN_LOGGED_STEPS, Turns, rows
from lightning_muon.optim import MuonAdamW, route_parameters

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

# Monitors are watched on GPT-2 small with small batches, where they cost the largest share.
WATCHED = GPT2_SMALL._replace(sequences=8)
TURN, PAIRS = 100, 2
TINY_TURN = 25
# The steps of which host syncs are counted, after the first, and those in which monitors measure.
STEPS = 10
# The strategies are compared in float32, where sums in another order are all that may differ.
SHARDED = Size(dim=256, depth=4, heads=4, context=128, vocabulary=1024, sequences=16, tied=False)
SHARDED_STEPS, SHARDED_LR = 6, 0.01
TOLERANCE = 1e-4  # of weights: a hundredth of what a step changes at this rate, and what rounding gives is far below


class Language(L.LightningModule):
    """Train a GPT on random tokens.

    Args:
        size: Its size.
        steps: Number of batches.
        options: Options of MuonAdamW.
    """

    def __init__(self, size: Size, steps: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.size = size
        self.steps = steps
        self.options = options
        self.net = make_gpt(size)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss; it stays on the device."""
        loss: Tensor = NextToken.forward(self, batch)  # type: ignore[arg-type]
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make MuonAdamW."""
        return MuonAdamW(route_parameters(self), **self.options)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the same few batches again and again."""
        batches = make_tokens(self.size, min(4, self.steps), self.size.sequences)
        again: Any = [batches[step % len(batches)] for step in range(self.steps)]
        return DataLoader(again, batch_size=None)


def make_trainer(measuring: Measuring, **options: Any) -> L.Trainer:
    """Make a quiet trainer on one device."""
    quiet: dict[str, Any] = {
        "accelerator": "gpu" if measuring.device == "cuda" else "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,  # it would shuffle under a strategy
    }
    return L.Trainer(**{**quiet, **options})


def configured_monitors(**options: Any) -> list[L.Callback]:
    """Make the monitors of ``configs/default.yaml``.

    Args:
        options: Further arguments of those that have them.
    """
    monitors = []
    for entry in read_config("default")["trainer"]["callbacks"]:
        if entry["class_path"].startswith("lightning_muon.callbacks."):
            known = signature(imported(entry["class_path"])).parameters
            taken = {name: value for name, value in options.items() if name in known}
            arguments = {**entry.get("init_args", {}), **taken}
            monitors.append(configured({"class_path": entry["class_path"], "init_args": arguments}))
    return monitors


def measure_monitors(measuring: Measuring) -> None:
    """Measure what the monitors add to the steps, and how often they make the host wait between their steps."""
    for name in measuring.each(["cost", "host syncs of ten steps"]):
        with measuring.row(name) as row:
            row.update(_cost(measuring) if name == "cost" else _host_syncs(measuring))


def _cost(measuring: Measuring) -> dict[str, Any]:
    turn, pairs = (TINY_TURN, 1) if measuring.tiny else (TURN, PAIRS)
    monitors = configured_monitors()
    turns = Turns(monitors, turn)
    module = Language(TINY if measuring.tiny else WATCHED, (1 + 2 * pairs) * turn, {"lr": 1e-4})
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            measuring,
            callbacks=[*monitors, turns],
            logger=TensorBoardLogger(folder, name=None),
            log_every_n_steps=read_config("default")["trainer"]["log_every_n_steps"],
            precision="bf16-mixed",
        )
        trainer.fit(module)
    found = {row["monitor"]: row for row in rows(turns)}
    # On a GPU the time inside a monitor contains waiting for the step itself: only the length of steps counts.
    paired, step = found[IN_LOGGED_STEPS], found["the steps themselves"]
    return {
        "step ms": step["ms in 10 steps"] / 10,
        "monitors, ms in 10 steps": paired["ms in 10 steps"],
        "% of the steps' time": paired["% of the steps' time"],
        "95 % interval": paired["95 % interval"],
        "loss": finite(module.losses),
    }


def _host_syncs(measuring: Measuring) -> dict[str, Any]:
    """Count by CUDA's sync debug mode, which warns of each operation that makes the host wait.

    Returns:
        The syncs of ten steps: without monitors, with monitors that measure in none of them, and in one of them.
    """
    measuring.needs_cuda()
    without = _syncs(measuring, None)
    return {
        "without monitors": without,
        "added, off cadence": _syncs(measuring, STEPS + 2) - without,
        "added, one of them measured": _syncs(measuring, STEPS) - without,
    }


def _syncs(measuring: Measuring, every_n_steps: int | None) -> int:
    monitors = configured_monitors(every_n_steps=every_n_steps) if every_n_steps else []
    module = Language(TINY, STEPS + 1, {"lr": 1e-4})
    with warnings.catch_warnings(record=True) as said, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        trainer = make_trainer(
            measuring,
            callbacks=[SyncWarnings(True), *monitors, SyncWarnings(False)],
            logger=TensorBoardLogger(folder, name=None),
            log_every_n_steps=every_n_steps or STEPS + 2,
        )
        try:
            trainer.fit(module)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)


class SyncWarnings(L.Callback):
    """Make CUDA warn of syncs, from the start of each step after the first, or no longer, at its end."""

    def __init__(self, begins: bool) -> None:
        self.begins = begins

    @property
    def state_key(self) -> str:
        """Return a key for each of the two."""
        return f"{type(self).__name__}, {self.begins}"

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin, unless it is the first step: it makes histograms and state."""
        if self.begins and trainer.global_step > 0:
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        if not self.begins:
            torch.cuda.set_sync_debug_mode("default")


class Watch(L.Callback):
    """Record the time of each step, and the weights at the end, flat: those of FSDP1 have no other shape."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Wait for the step and record the time."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the weights, before the strategy moves them."""
        for parameter in pl_module.parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            self.weights.append(whole.detach().flatten().float().cpu())

    def step_seconds(self) -> float:
        """Return the median time between steps, without the first two."""
        return statistics.median(end - start for start, end in zip(self.ends[1:], self.ends[2:], strict=False))


def measure_strategies(measuring: Measuring) -> None:
    """Train under each strategy on one device: in float32 as without strategy, and in bfloat16 with a finite loss."""
    alone: list[Tensor] = []
    names = ["one device", "fsdp2", "fsdp"]
    for what in measuring.each([f"{name}, {precision}" for precision in ("32-true", "bf16-mixed") for name in names]):
        name, precision = what.split(", ")
        with measuring.row(what) as row:
            if name == "fsdp" and measuring.device != "cuda":
                raise SkippedError("no CUDA, which FSDPStrategy needs")
            watch, losses = _train(measuring, name, precision)
            row.update(strategy=name, precision=precision)
            row["first loss"], row["last loss"] = finite(losses[:1]), finite(losses[-1:])
            row["step ms"] = 1e3 * watch.step_seconds()
            if precision == "32-true" and name == "one device":
                alone = watch.weights
            elif precision == "32-true":
                row["weights differ by"] = difference(watch.weights, alone)


def _train(measuring: Measuring, name: str, precision: str) -> tuple[Watch, list[Tensor]]:
    entry: Any = "auto" if name == "one device" else read_config(f"strategy/{name}")["trainer"]["strategy"]
    options: dict[str, Any] = {"lr": SHARDED_LR}
    if precision == "32-true":
        options.update(orthogonalizer_options={"dtype": "float32"}, communication_dtype="float32")
    watch = Watch()
    module = Language(TINY._replace(tied=False) if measuring.tiny else SHARDED, SHARDED_STEPS, options)
    trainer = make_trainer(measuring, strategy=configured(entry), callbacks=[watch], precision=precision)
    trainer.fit(module)
    return watch, module.losses


def difference(weights: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest difference of weights.

    Raises:
        ValueError: If there are no others, or the difference is larger than rounding can make it.
    """
    if not others:
        raise ValueError("the run on one device has failed: there is nothing to compare with")
    largest = max(float((own - other).abs().max()) for own, other in zip(weights, others, strict=True))
    if not largest <= TOLERANCE:
        raise ValueError(f"the weights differ by {largest} from those of one device; allowed is {TOLERANCE}")
    return largest


def finite(losses: Sequence[Tensor]) -> float:
    """Return the last of some losses.

    Raises:
        ValueError: If one of them is not finite.
    """
    values = torch.stack([loss.float() for loss in losses])
    if not values.isfinite().all():
        raise ValueError(f"losses that are not finite: {values.tolist()}")
    return float(values[-1])
