"""Under which tags the report finds what it shows, and that it agrees with TensorBoard's page and with the docs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_muon import callbacks
from lightning_muon.callbacks import AutoWeightDecay, HyperparameterSchedule, UpdateRMSMonitor
from lightning_muon.callbacks.tensorboard.pages import layout
from lightning_muon.optim import MuonAdamW
from lightning_muon.report import QUANTITIES, Comparison, Quantity, RunLog, compare, health, quantities
from lightning_muon.report.curves import draw_curves
from lightning_muon.report.groups import Group
from lightning_muon.report.quantities import quantity
from lightning_muon.report.run_log import logger_prefix

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]


def run_of(*logged: str) -> RunLog:
    return RunLog("run", Path("run"), {tag: [(0, 2.0), (9, 1.0)] for tag in logged}, {})


def figures(comparison: Comparison) -> dict[str, Any]:
    times = ("optimizer_share", "throughput")
    return {line.label: figure for line, (figure,) in comparison.lines if not line.tags.startswith(times)}


def monitors() -> list[Any]:
    others = {
        "MuonDashboard",
        "HyperparameterSchedule",
        "NonFiniteError",
        "ParameterSummary",
        "PredictionWriter",
        "QKClip",
        "StepProgressBar",
        "StopOnSignal",
        "TargetBatch",
    }
    names = [name for name in callbacks.__all__ if name[0].isupper() and name not in others]
    options = {"WeightRMSMonitor": {"outputs": ["net.*"], "per_parameter": True}}
    watching = [getattr(callbacks, name)(every_n_steps=1, **options.get(name, {})) for name in names]
    return [*watching, HyperparameterSchedule("momentum", {0: 0.9, -1: 0.95})]


@pytest.mark.parametrize("make_logger", [TensorBoardLogger, CSVLogger])
@pytest.mark.parametrize("prefix", ["x", "a-b"])
def test_a_loggers_prefix_changes_nothing(
    regression: Module, fit: Fit, tmp_path: Path, make_logger: Any, prefix: str
) -> None:
    reports = {}
    for given in ("", prefix):
        logger = make_logger(tmp_path / f"logs{given}", prefix=given)
        fit(regression(MuonAdamW), callbacks=monitors(), logger=logger, limit_val_batches=1)
        logger.save()
        logger.finalize("success")
        reports[given] = compare([logger.log_dir], limit=1)
    assert figures(reports[prefix]) == figures(reports[""])
    (plain,), (prefixed,) = reports[""].runs, reports[prefix].runs
    assert set(prefixed.scalars) == set(plain.scalars)
    # The verdict on a whole run is not compared: that on the share of time depends on the load of the machine.
    assert [health.is_monitored(run) for run in (plain, prefixed)] == [True, True]
    # Whatever a monitor logs is known as such, so that its prefix is found.
    users = {"train/loss", "val/loss", "epoch", "hp_metric", "optimizer_share", "weight_bits", "rate_ratio"}
    assert quantities.matching(plain.scalars, rf"({quantities.NAMES})/.+") == [
        tag for tag in plain.scalars if tag not in users
    ]


@pytest.mark.parametrize(
    ("logged", "prefix"),
    [
        (["a-b-weight_rms/max", "a-b-val_loss"], "a-b-"),
        (["x-optimizer_share"], "x-"),
        (["weight_rms/max", "update_rms/group_0-1", "lr-AdamW"], ""),
        (["weight_rms/max", "weight_rms/mean", "my-weight_rms/max"], ""),  # a tag that looks like it
        (["x-val_loss", "lr-AdamW"], ""),  # without monitors, nothing tells
    ],
)
def test_what_a_prefix_is(logged: list[str], prefix: str) -> None:
    assert logger_prefix(logged) == prefix


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        ("loss", "other"),
        ("train/loss", "other"),
        ("train_loss_step", "other"),
        ("training_loss", "other"),
        ("Loss/train", "other"),
        ("loss/train", "other"),
        ("val/loss", "validation"),
        ("val_loss", "validation"),
        ("eval_loss", "validation"),
        ("loss/val", "validation"),
        ("validation_loss/dataloader_idx_0", "validation"),
        ("Loss/validation", "validation"),
        ("interval_loss", "other"),
        ("val/accuracy", None),
        ("weight_rms/loss_head.weight", None),
        ("x-weight_rms/loss_head.weight", None),
        ("lost_updates/max", None),
        ("lr-loss_head", None),
    ],
)
def test_page_table_and_curves_agree_on_what_a_loss_is(tag: str, kind: str | None) -> None:
    assert ("Loss" in layout([tag]).get("Overview", {})) == (kind is not None)
    labels = {line.label for line in health.lines([run_of(tag)])}
    assert (f"{tag}, final" in labels) == (kind is not None)
    assert (f"{tag}, above its best" in labels) == (kind == "validation")
    drawn = {"validation": quantities.VALIDATION_LOSS, "other": quantities.OTHER_LOSS}
    assert [name for name, pattern in drawn.items() if quantities.matching([tag], pattern)] == ([kind] if kind else [])


def axes_of(runs: list[RunLog], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The panels that are drawn, by their titles."""
    from matplotlib import pyplot

    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    assert draw_curves([Group(run.name, (run,)) for run in runs], folder / "curves.png") is None
    monkeypatch.undo()
    (figure,) = drawn
    pyplot.close(figure)
    return {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
def test_curves_are_drawn_whatever_losses_and_groups_are_called(
    regression: Module, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(regression):  # type: ignore[valid-type,misc]
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            inputs, targets = batch
            loss = (self.net(inputs) - targets).square().mean()
            self.log("train_loss", loss)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            inputs, targets = batch
            self.log("val_loss", (self.net(inputs) - targets).square().mean())

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            matrices = [self.net[2].weight]
            rest = [parameter for parameter in self.net.parameters() if parameter is not matrices[0]]
            return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest)]

    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    watch = [UpdateRMSMonitor(every_n_steps=1), AutoWeightDecay(every_n_steps=1)]
    fit(Plain(None), callbacks=watch, logger=logger, limit_val_batches=1, max_epochs=2)
    logger.finalize("success")
    (run,) = compare([tmp_path], limit=1).runs
    expected = {
        "loss: validation solid, others dashed": {"val_loss": "-", "train_loss": "--"},
        "weight decay: group_0 solid": {"weight_decay/group_0": "-"},
        "update RMS: group_0 solid, group_0-1 dashed": {"update_rms/group_0": "-", "update_rms/group_0-1": "--"},
        "effective learning rate: group_0 solid, group_0-1 dashed": {
            "effective_lr/group_0": "-",
            "effective_lr/group_0-1": "--",
        },
    }
    axes = axes_of([run], tmp_path, monkeypatch)
    assert set(axes) == set(expected)
    for title, styles in expected.items():
        lines = {line.get_linestyle(): list(map(tuple, line.get_xydata())) for line in axes[title].get_lines()}
        assert lines == {style: run.scalars[tag] for tag, style in styles.items()}, title


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
def test_the_lines_of_the_curves_are_at_the_ends_of_the_healthy_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = axes_of([run_of("weight_rms/max", "bf16_headroom/min", "orthogonality_error/mean")], tmp_path, monkeypatch)
    limits = {title.split(":")[0]: axis.get_lines()[-1].get_ydata()[0] for title, axis in axes.items()}
    assert limits == {"weight RMS": 1.0, "bf16 headroom": 1.0, "orthogonality error": 0.7}


@pytest.mark.parametrize("name", ["bf16_headroom", "singular_value_max"])
def test_titles_of_the_page_call_healthy_what_the_report_does(name: str) -> None:
    entry = quantity(name)
    assert entry.healthy.words in entry.chart.title


@pytest.mark.parametrize("entry", [entry for entry in QUANTITIES if entry.limit], ids=lambda entry: entry.name)
def test_monitors_warn_at_the_limits_of_the_table(entry: Quantity) -> None:
    monitor = getattr(callbacks, entry.monitor)()
    limits = monitor._limits if hasattr(monitor, "_limits") else {entry.name: monitor._limit}
    assert limits[entry.name].bound == entry.limit


def test_a_healthy_iteration_is_not_called_sick() -> None:
    """Jordan's coefficients bring singular values up to 1.2024 by design; bf16 rounds that up a little."""
    sigma = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    assert sigma.max() > 1.2
    assert quantity("singular_value_max").healthy.judge(1.02 * float(sigma.max())) == "ok"
