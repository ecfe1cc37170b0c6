"""Condition numbers and stable ranks of gradients and momenta, against float64 singular values."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.callbacks import GradientMonitor
from lightning_muon.callbacks.measures.singular_values import (
    LARGEST_CONDITION,
    condition_and_stable_rank,
    tridiagonals,
    unit_grams,
)
from lightning_muon.optim import MuonAdamW
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

MATRICES = ("net.0.weight", "net.2.weight")
KINDS_OF = ("gradient", "momentum")
KINDS = [f"{kind}_{quantity}" for kind in KINDS_OF for quantity in ("condition_log10", "stable_rank")]


def measured(matrices: Tensor) -> list[tuple[float, float]]:
    """κ and stable rank of each matrix, as the monitor finds them."""
    return [(k, rank) for k, rank in condition_and_stable_rank(tridiagonals(unit_grams(matrices))).tolist()]


def exact(matrix: Tensor) -> tuple[float, float]:
    """κ, which ends where the monitor's does, and stable rank, from all singular values."""
    values = torch.linalg.svdvals(matrix.double())
    condition = min(float(values[0] / values[-1]), LARGEST_CONDITION)
    return condition, float((values / values[0]).square().sum())


def with_singular_values(values: Tensor, columns: int) -> Tensor:
    """A matrix of these singular values, float64."""
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64)).Q for size in (len(values), columns)
    )
    return (left * values.double()) @ right.mT


SPECTRA = {
    "random": torch.linalg.svdvals(torch.randn(128, 512, generator=torch.Generator().manual_seed(0))),
    "random, square": torch.linalg.svdvals(torch.randn(128, 128, generator=torch.Generator().manual_seed(0))),
    "all alike": torch.ones(40),
    "evenly spread": torch.linspace(1.0, 2.0, 100),
    "1/k": 1 / torch.arange(1, 129),
    "100": torch.logspace(0, -2, 128),
    "1e4": torch.logspace(0, -4, 128),
    "1e6": torch.logspace(0, -6, 64, dtype=torch.float64),
    "few that stand apart": torch.cat([torch.tensor([50.0, 30.0, 1.0]), torch.linspace(1e-3, 2e-3, 61)]),
    "one small": torch.cat([torch.linspace(1.0, 2.0, 60), torch.tensor([1e-5])]),
    "one value": torch.ones(1),
    "two": torch.tensor([3.0, 1e-3]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("tall", [False, True])
def test_against_singular_values(spectrum: str, tall: bool) -> None:
    torch.manual_seed(1)
    matrix = with_singular_values(SPECTRA[spectrum], 140)
    (found,) = measured(matrix.T.unsqueeze(0) if tall else matrix.unsqueeze(0))
    assert found == pytest.approx(exact(matrix), rel=1e-2)
    # From inside.
    assert found[0] <= exact(matrix)[0] * (1 + 1e-4)
    assert found[1] >= exact(matrix)[1] * (1 - 1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_does_not_matter(size: float) -> None:
    matrix = torch.randn(1, 20, 30)
    assert measured(matrix * size) == [pytest.approx(measured(matrix)[0], rel=1e-5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precisions_are_widened(dtype: torch.dtype) -> None:
    matrix = torch.randn(1, 40, 24).to(dtype)
    assert measured(matrix) == [pytest.approx(exact(matrix[0]), rel=1e-2)]


@pytest.mark.parametrize("rank", [1, 2, 8, 40])
def test_lost_rank_is_the_end_of_the_scale(rank: int) -> None:
    """In float32 the rest is rounding, of a κ that says nothing; in float64 too."""
    torch.manual_seed(0)
    left, right = torch.randn(64, rank, dtype=torch.float64), torch.randn(rank, 100, dtype=torch.float64)
    for matrix in (left @ right, (left @ right).float()):
        ((condition, stable_rank),) = measured(matrix.unsqueeze(0))
        assert condition == pytest.approx(LARGEST_CONDITION)
        assert stable_rank == pytest.approx(exact(matrix)[1], rel=1e-2)


def test_a_batch_of_everything() -> None:
    """A broken matrix, or one of zeros, does not touch the others."""
    torch.manual_seed(0)
    batch = torch.randn(6, 16, 24)
    batch[1] = 0
    batch[2, 3, 4] = torch.nan
    batch[3, 0, 0] = torch.inf
    batch[4] = torch.outer(torch.randn(16), torch.randn(24))
    found = measured(batch)
    for place in (0, 5):
        assert found[place] == pytest.approx(exact(batch[place]), rel=1e-3)
    assert found[1] == (0.0, 0.0)
    assert all(math.isnan(value) for value in (*found[2], *found[3]))
    assert found[4] == pytest.approx((LARGEST_CONDITION, 1.0))


class Whole(Callback):
    """Gradients before clipping and momenta after the step, of each step; hears a step before the monitor."""

    def __init__(self, state: str = "momentum_buffer") -> None:
        self.state = state
        self.gradients: list[dict[str, Tensor]] = []
        self.momenta: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.gradients.append({name: pl_module.get_parameter(name).grad.double().clone() for name in MATRICES})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        states = {name: trainer.optimizers[0].state[pl_module.get_parameter(name)] for name in MATRICES}
        self.momenta.append({n: s[self.state].double().clone() for n, s in states.items() if self.state in s})


def as_logged(matrix: Tensor) -> tuple[float, float]:
    """log10 of the condition number, and the stable rank."""
    condition, stable_rank = exact(matrix)
    return math.log10(condition), stable_rank


def check(scalars: Any, steps: list[int], whole: Whole) -> None:
    for kind, tensors in (("gradient", whole.gradients), ("momentum", whole.momenta)):
        for place, quantity in enumerate(("condition_log10", "stable_rank")):
            tag = f"{kind}_{quantity}"
            for name in MATRICES:
                assert [step for step, _ in scalars[f"{tag}/{name}"]] == steps
                for step, value in scalars[f"{tag}/{name}"]:
                    assert value == pytest.approx(as_logged(tensors[step][name])[place], rel=1e-2)
            for summary, reduce in (("max", max), ("min", min)):
                pairs = zip(*(scalars[f"{tag}/{name}"] for name in MATRICES), strict=True)
                expected = [reduce(value for _, value in pair) for pair in pairs]
                assert [value for _, value in scalars[f"{tag}/{summary}"]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (partial(MuonAdamW, lr=0.02), "momentum_buffer"),
        (partial(torch.optim.AdamW, lr=0.02), "exp_avg"),
        (partial(torch.optim.SGD, lr=0.02, momentum=0.9), "momentum_buffer"),
    ],
)
def test_values(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, make: Any, state: str
) -> None:
    whole = Whole(state)
    monitor = GradientMonitor(every_n_steps=3, per_parameter=True)
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}  # which changes more than the size
    trainer = fit(regression(make), precision="64-true", callbacks=[whole, monitor], logger=tensorboard, **options)
    check(events(trainer).scalars(), [2, 5, 8], whole)


def test_with_a_gradient_scaler(
    overflowing: Module, fit: Fit, scaled: Any, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """It skips the second step, which is not measured; what is, is not scaled."""

    whole = Whole()
    callbacks = [whole, GradientMonitor(2, per_parameter=True)]
    trainer = fit(overflowing(MuonAdamW), plugins=[scaled()], callbacks=callbacks, logger=tensorboard)
    check(events(trainer).scalars(), [2, 3, 5, 7, 9], whole)


def test_an_optimizer_without_momentum(regression: Module, fit: Fit) -> None:
    trainer = fit(regression(partial(torch.optim.SGD, lr=0.1)), callbacks=[GradientMonitor(1)])
    logged = {name.split("/")[0] for name in watched(trainer)} - {"train"}
    assert logged == {"gradient_condition_log10", "gradient_stable_rank"}


def test_several_optimizers_and_torch_muon(adversaries: Module, fit: Fit) -> None:
    def make(groups: list[dict[str, Any]], place: int) -> Optimizer:
        if place == 0:
            return MuonAdamW(groups)
        return torch.optim.Muon([p for group in groups for p in group["params"] if p.ndim == 2])

    trainer = fit(adversaries(make), callbacks=[GradientMonitor(1, per_parameter=True)])
    hidden = {f"generator.{layer}.weight" for layer in (0, 2)} | {f"critic.{layer}.weight" for layer in (0, 2, 4)}
    for kind in KINDS:
        logged = {name.split("/")[1] for name in watched(trainer) if name.startswith(kind)}
        assert logged == hidden | {"max", "mean", "min"}


class Blocks(Callback):
    """Gradients of known singular values in a fused projection of three blocks."""

    def __init__(self, *blocks: Tensor) -> None:
        self.gradient = torch.cat(blocks).float()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        pl_module.attention.in_proj_weight.grad = self.gradient.clone()


def attended(regression: Any) -> Any:
    class Attended(regression):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            self.attention = nn.MultiheadAttention(8, 1, bias=False, batch_first=True)
            self.untouched = nn.Linear(8, 8)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x = batch[0].unsqueeze(1)
            return super().training_step(batch, batch_idx) + self.attention(x, x, x)[0].square().mean()

    return Attended()


def test_of_several_matrices_the_worst_counts(regression: Module, fit: Fit) -> None:
    """The largest κ and the smallest rank, of different blocks; a block of zeros has neither."""
    torch.manual_seed(0)
    uneven = with_singular_values(torch.tensor([1.0] * 7 + [1e-3]), 8)
    narrow = with_singular_values(torch.tensor([1.0] + [0.1] * 7), 8)
    monitor = GradientMonitor(1, per_parameter=True, sample=9)
    trainer = fit(attended(regression), callbacks=[Blocks(uneven, narrow, torch.zeros(8, 8)), monitor], max_steps=1)
    found = {tag: float(value) for tag, value in watched(trainer).items()}
    for kind in ("gradient", "momentum"):  # the first momentum is a part of the gradient
        assert found[f"{kind}_condition_log10/attention.in_proj_weight"] == pytest.approx(3, abs=1e-3)
        assert found[f"{kind}_stable_rank/attention.in_proj_weight"] == pytest.approx(1.07, rel=1e-3)
    assert not [tag for tag in found if "untouched" in tag]  # it has no gradient


def test_zeros_are_left_out_and_nan_is_named(regression: Module, fit: Fit) -> None:
    zeros = fit(
        attended(regression),
        callbacks=[Blocks(*torch.zeros(3, 8, 8)), GradientMonitor(1, per_parameter=True, sample=9)],
        max_steps=1,
    )
    assert "gradient_condition_log10/net.0.weight" in watched(zeros)
    assert not [tag for tag in watched(zeros) if "in_proj_weight" in tag]
    broken = torch.eye(8).repeat(3, 1, 1)
    broken[1, 2, 3] = torch.nan
    with pytest.warns(UserWarning, match=r"gradient_condition_log10 is not finite for attention\.in_proj_weight\."):
        trainer = fit(attended(regression), callbacks=[Blocks(*broken), GradientMonitor(1, sample=9)], max_steps=1)
    assert math.isnan(watched(trainer)["gradient_condition_log10/max"])


@pytest.mark.parametrize("kept", ["int8", "bfloat16"])
def test_momenta_in_fewer_bytes_are_measured_by_their_values(kept: str, regression: Module, fit: Fit) -> None:
    found = []
    for options in ({}, {"momentum_dtype": kept}):
        module = regression(partial(MuonAdamW, **options))
        trainer = fit(module, callbacks=[GradientMonitor(1, per_parameter=True)], max_steps=1)
        found.append({tag: float(v) for tag, v in watched(trainer).items() if tag.split("_")[0] in KINDS_OF})
    assert found[0].keys() == found[1].keys()
    stored = {value.dtype for state in trainer.optimizers[0].state.values() for value in state.values()}
    assert (torch.int8 if kept == "int8" else torch.bfloat16) in stored
    momentum = trainer.optimizers[0].state_of(module.get_parameter(MATRICES[0]))["momentum_buffer"]
    assert found[1][f"momentum_condition_log10/{MATRICES[0]}"] == pytest.approx(as_logged(momentum)[0], abs=5e-3)
    for tag, value in found[0].items():
        # Rounding fills in singular values of zero, so where κ has no bound that of the rounded momentum has.
        if "momentum_condition_log10" not in tag:
            assert found[1][tag] == pytest.approx(value, rel=0.0 if tag.startswith("gradient") else 0.02), tag


def test_convolutions(fit: Fit, regression: Module) -> None:
    """A kernel (out, in, height, width) is the matrix (out, in · height · width)."""

    class Convolution(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            self.net = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 4))

    module = Convolution()
    trainer = fit(module, callbacks=[GradientMonitor(1, per_parameter=True)], max_steps=1)
    gradient = module.get_parameter("net.1.weight").grad
    assert gradient is not None
    for quantity, value in zip(("condition_log10", "stable_rank"), as_logged(gradient.flatten(1)), strict=True):
        found = float(watched(trainer)[f"gradient_{quantity}/net.1.weight"])
        assert found == pytest.approx(value, rel=1e-2)


def test_the_default_cadence_is_every_tenth_log(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[GradientMonitor()], logger=tensorboard, max_epochs=4)
    assert [step for step, _ in events(trainer).scalars()["gradient_condition_log10/max"]] == [9, 19, 29, 39]
    never = fit(regression(MuonAdamW), callbacks=[GradientMonitor()], log_every_n_steps=0)
    assert not [tag for tag in watched(never) if "condition" in tag]


def test_the_sample_is_bounded(regression: Module, fit: Fit) -> None:
    for options, names in (({"sample": 1}, {MATRICES[0]}), ({"max_elements": 130}, {MATRICES[0]})):
        trainer = fit(regression(MuonAdamW), callbacks=[GradientMonitor(1, per_parameter=True, **options)])
        tags = {tag for tag in watched(trainer) if tag.startswith("gradient_condition_log10/net")}
        assert tags == {f"gradient_condition_log10/{name}" for name in names}


def test_one_is_told_where_nothing_is_left(regression: Module, fit: Fit) -> None:
    with pytest.warns(UserWarning, match="GradientMonitor: none of Muon's matrices is whole and has at most max_elem"):
        trainer = fit(regression(MuonAdamW), callbacks=[GradientMonitor(1, max_elements=10)])
    assert not [tag for tag in watched(trainer) if "condition" in tag]


@pytest.mark.parametrize("argument", ["every_n_steps", "sample", "max_elements"])
def test_bad_arguments_are_named(argument: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"GradientMonitor: {argument} must be at least 1, got 0"):
        GradientMonitor(**{argument: 0})
