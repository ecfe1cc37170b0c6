"""All monitors together in every kind of run: it trains as without them, and each logger gets what it can take."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_muon import callbacks
from lightning_muon.callbacks import WeightRMSMonitor
from lightning_muon.optim import MuonAdamW
from lightning_muon.report.tags import name_of
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

WEIGHTS = {"weight_rms", "weight_absmax", "doublings_to_overflow", "bf16_headroom", "lost_updates"}
WEIGHTS |= {"output_rms", "weight_bits"}
UPDATES = {"orthogonality_error", "singular_value_min", "singular_value_max", "update_rms"}
UPDATES |= {"effective_lr", "rate_ratio", "angular_update", "angular_equilibrium", "operator_error", "needed_steps"}
GRADIENTS = {f"{what}_{how}" for what in ("gradient", "momentum") for how in ("condition_log10", "stable_rank")}
ALL = WEIGHTS | UPDATES | GRADIENTS | {"weight_decay", "optimizer_share", "optimizer_state", "throughput"}


VERDICTS = {"at_a_glance", "by_quantity", "watch_limits"}  # by the dashboard, of what the others log


def monitors() -> list[Callback]:
    """Every callback of the package that only watches, at every step."""
    found: list[Callback] = []
    others = {"HyperparameterSchedule", "NonFiniteError", "ParameterSummary", "PredictionWriter", "StepProgressBar"}
    others |= {"QKClip", "StopOnSignal", "TargetBatch"}
    for name in [name for name in callbacks.__all__ if name[0].isupper() and name not in others]:
        options: dict[str, Any] = {} if name == "MuonDashboard" else {"every_n_steps": 1}
        if name == "WeightRMSMonitor":
            options |= {"outputs": ["net.*"], "as_if_bf16": True}
        found.append(getattr(callbacks, name)(**options))
    return found


def quantities(tags: Any) -> set[str]:
    """What was measured, by the first part of the tags."""
    return {tag.split("/")[0] for tag in tags} - {"train", "val", "hp_metric", "epoch", "step", *VERDICTS}


def compare(module: Callable[[], LightningModule], fit: Fit, **options: Any) -> Trainer:
    """Fit with all monitors and without: the weights must be the same bits."""
    plain, module_watched = module(), module()
    fit(plain, **{**options, "logger": False})
    trainer = fit(module_watched, callbacks=monitors(), **options)
    for a, b in zip(plain.parameters(), module_watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(math.isfinite(float(value)) for value in watched(trainer).values())
    return trainer


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_automatic_optimization(regression: Module, fit: Fit, precision: str, options: dict[str, Any]) -> None:
    trainer = compare(lambda: regression(MuonAdamW), fit, precision=precision, **options)
    assert quantities(watched(trainer)) == ALL


def test_weights_in_bfloat16(regression: Module, fit: Fit) -> None:
    trainer = compare(lambda: regression(MuonAdamW), fit, precision="bf16-true")
    assert quantities(watched(trainer)) == ALL


def test_a_gradient_scaler(regression: Module, fit: Fit, scaled: Any) -> None:
    trainer = compare(lambda: regression(MuonAdamW), lambda *a, **o: fit(*a, plugins=[scaled()], **o))
    assert quantities(watched(trainer)) == ALL


def test_adamw_on_the_same_groups(regression: Module, fit: Fit) -> None:
    trainer = compare(lambda: regression(torch.optim.AdamW), fit)
    of_muon = {
        "rate_ratio",
        "orthogonality_error",
        "singular_value_min",
        "singular_value_max",
        "operator_error",
        "needed_steps",
    }
    assert quantities(watched(trainer)) == ALL - of_muon


def torch_muon(module: LightningModule) -> list[torch.optim.Optimizer]:
    matrices = [module.get_parameter(name) for name in ("net.0.weight", "net.2.weight")]
    rest = [p for p in module.parameters() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest)]


def test_torch_muon_under_manual_optimization(regression: Module, fit: Fit) -> None:
    class Manual(regression):  # type: ignore[valid-type,misc]
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return torch_muon(self)

    trainer = compare(lambda: Manual(None), fit)
    assert quantities(watched(trainer)) == ALL - {"needed_steps"}


@pytest.mark.parametrize("way", ["in place", pytest.param("wrapped", marks=pytest.mark.slow)])
def test_compiled_nets(regression: Module, fit: Fit, way: str) -> None:
    class Compiled(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            if way == "in place":
                self.net.compile(backend="aot_eager")
            else:
                self.net: Any = torch.compile(self.net, backend="aot_eager")

    with pytest.warns(UserWarning, match=r"torch\.compile has made net\.0, net\.1"):
        trainer = compare(Compiled, fit)
    assert quantities(watched(trainer)) == ALL - {"output_rms"}
    assert {tag for tag in watched(trainer) if "_orig_mod" in tag} == set()


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"logger": False}, {"log_every_n_steps": 0}])
def test_runs_that_log_nothing(regression: Module, fit: Fit, options: dict[str, Any]) -> None:
    module = regression(MuonAdamW)
    fit(module, callbacks=monitors(), limit_val_batches=2, **options)
    assert module.losses


def test_several_loggers_get_the_same_numbers(regression: Module, fit: Fit, tmp_path: Path, events: Any) -> None:
    boards = [TensorBoardLogger(tmp_path / name, default_hp_metric=False) for name in ("one", "two")]
    prefixed = TensorBoardLogger(tmp_path / "prefixed", prefix="run", default_hp_metric=False)
    table = CSVLogger(tmp_path / "table")
    trainer = fit(regression(MuonAdamW), callbacks=monitors(), logger=[boards[0], table, boards[1], prefixed])
    first, second, third = (events(trainer, logger).scalars() for logger in (*boards, prefixed))
    assert first == second == {name_of(tag.removeprefix("run-")): v for tag, v in third.items()}
    assert quantities(first) == ALL
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        lines = [{name_of(tag): value for tag, value in line.items()} for line in csv.DictReader(file)]
    for tag, values in first.items():
        found = [float(line[tag]) for line in lines if line[tag]]
        assert found == pytest.approx([value for _, value in values], rel=1e-6), tag


def test_a_logger_that_overrides_how_it_logs_is_asked(regression: Module, fit: Fit, tmp_path: Path) -> None:
    class Own(TensorBoardLogger):
        seen: set[str] = set()  # noqa: RUF012 - of this test alone

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.seen |= set(metrics)

    fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor()], logger=Own(tmp_path))
    assert "watch/weight_rms/max" in Own.seen


def test_a_resumed_run_logs_what_the_whole_run_logs(regression: Module, fit: Fit, tmp_path: Path, events: Any) -> None:
    def run(name: str, module: LightningModule, **options: Any) -> dict[str, list[tuple[int, float]]]:
        logger = TensorBoardLogger(tmp_path / name, default_hp_metric=False)
        trainer = fit(module, callbacks=monitors(), logger=logger, **options)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        found: dict[str, list[tuple[int, float]]] = events(trainer).scalars()
        return {
            tag: values
            for tag, values in found.items()
            if tag.split("/")[0] not in {"optimizer_share", "optimizer_state", "throughput", "epoch", *VERDICTS}
        }

    whole = run("whole", regression(MuonAdamW), max_epochs=2)
    run("begun", regression(MuonAdamW), max_epochs=1)
    resumed = run("resumed", regression(MuonAdamW, seed=5), max_epochs=2, ckpt_path=str(tmp_path / "begun.ckpt"))
    second_half = {tag: [(step, value) for step, value in values if step >= 10] for tag, values in whole.items()}
    assert resumed == second_half
