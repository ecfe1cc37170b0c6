"""The verdict while a run goes on: where it is written, that it is the report's, and that it waits for nothing."""

import builtins
import csv
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_muon.callbacks import MuonDashboard, OrthogonalityMonitor, WeightRMSMonitor
from lightning_muon.callbacks.record import MOST_POINTS, Record
from lightning_muon.optim import MuonAdamW
from lightning_muon.report import compare
from lightning_muon.report.run_log import read_run
from lightning_muon.report.verdict import health_of

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

PLOTS = importlib.util.find_spec("matplotlib") is not None
LONG = {"max_epochs": 8, "limit_val_batches": 1, "log_every_n_steps": 5}  # 80 steps: long enough to be judged


def monitors() -> list[Callback]:
    return [WeightRMSMonitor(), OrthogonalityMonitor(), MuonDashboard()]


def sick(groups: Any) -> torch.optim.Optimizer:
    return MuonAdamW(groups, lr=2.0, weight_decay=0.0)


@pytest.mark.parametrize(("make", "expected"), [(partial(MuonAdamW, lr=0.002), "ok"), (sick, "bad")])
def test_the_last_verdict_is_that_of_the_report(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, make: Any, expected: str
) -> None:
    trainer = fit(regression(make), callbacks=monitors(), logger=tensorboard, **LONG)
    scalars, texts = events(trainer).scalars(), events(trainer).texts("at_a_glance/verdict")
    run = read_run(Path(str(trainer.log_dir)), "run")
    health = health_of(run)
    assert compare([run.path], limit=1).verdicts() == [health.verdict]
    assert (health.verdict == "bad") == (expected == "bad")
    assert scalars["at_a_glance/health"][-1][1] == pytest.approx(health.severity, rel=1e-5)
    for name, severity in health.severities().items():
        assert scalars[f"by_quantity/{name}"][-1][1] == pytest.approx(severity, rel=1e-5, abs=1e-6), name
    assert scalars["at_a_glance/health"][-1][1] == max(
        scalars[f"by_quantity/{name}"][-1][1] for name in health.severities()
    )
    assert texts[-1].startswith("## ")
    assert health.verdict in texts[-1]
    if expected == "bad":
        assert f"since step {health.since}" in texts[-1].replace("\\", "")
        assert (
            "raise weight\\_decay" in texts[-1]
            or "raise `weight_decay`" in texts[-1]
            or "raise weight_decay" in texts[-1]
        )
    # Of a line two ends are enough; many points would hide what is far from it, as TensorBoard leaves out outliers.
    limit = scalars["watch_limits/health_bad"]
    assert limit[-1] == (scalars["at_a_glance/health"][-1][0], 2.0)
    assert len(limit) < len(scalars["by_quantity/weight_rms"]) / 2
    # The first group of every logger: the verdict, and copies of the losses.
    assert [value for _, value in scalars["at_a_glance/loss"]] == [value for _, value in scalars["train/loss"]]
    assert [value for _, value in scalars["at_a_glance/val_loss"]] == [value for _, value in scalars["val/loss"]]


def test_every_logger_gets_the_verdict(regression: Module, fit: Fit, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(regression(MuonAdamW), callbacks=monitors(), logger=logger, **LONG)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert {"at_a_glance/health", "by_quantity/weight_rms", "by_quantity/orthogonality_error"} <= set(found[0])
    assert (Path(logger.log_dir) / "health.png").exists() == PLOTS


@pytest.mark.skipif(not PLOTS, reason="matplotlib is optional")
def test_the_picture_is_in_the_folder_and_on_the_page(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger
) -> None:
    from PIL import Image

    trainer = fit(regression(sick), callbacks=monitors(), logger=tensorboard, **LONG)
    tensorboard.experiment.flush()
    picture = Image.open(Path(str(trainer.log_dir)) / "health.png").convert("RGB")
    colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
    assert colours[(198, 40, 40)] > picture.width * 20  # the red head
    read = EventAccumulator(str(trainer.log_dir), size_guidance={"images": 0}).Reload()
    assert [event.step for event in read.Images("at_a_glance/picture")] == [80]  # a short run has one, at its end


def test_without_matplotlib_one_line_says_so(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    own = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return own(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level("INFO", logger="lightning.pytorch"):  # which --quiet of another test has raised
        trainer = fit(regression(MuonAdamW), callbacks=monitors(), logger=tensorboard, limit_val_batches=1)
    said = [record.message for record in caplog.records if "matplotlib" in record.message]
    assert said == ["MuonDashboard: no picture without matplotlib: pip install matplotlib"]
    assert not (Path(str(trainer.log_dir)) / "health.png").exists()


def test_a_run_that_fails_has_its_verdict(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    class Fails(regression):  # type: ignore[valid-type,misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_step == 70:
                raise RuntimeError("out of luck")
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

    module = Fails(sick)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, callbacks=monitors(), logger=tensorboard, **LONG)
    assert "bad" in events(module.trainer).texts("at_a_glance/verdict")[-1]


def test_a_resumed_run_is_judged_by_all_that_it_logged(regression: Module, fit: Fit, tmp_path: Path) -> None:
    logger = partial(TensorBoardLogger, tmp_path, "logs", 0, default_hp_metric=False)
    options = {**LONG, "max_epochs": 4}
    first = fit(regression(MuonAdamW), callbacks=monitors(), logger=logger(), **options)
    first.save_checkpoint(tmp_path / "half.ckpt")
    first.logger.finalize("success")
    resumed = fit(
        regression(MuonAdamW), callbacks=monitors(), logger=logger(), ckpt_path=str(tmp_path / "half.ckpt"), **LONG
    )
    resumed.logger.experiment.flush()
    (written,) = [one for one in resumed.callbacks if isinstance(one, MuonDashboard)]  # type: ignore[attr-defined]
    assert written._health is not None
    run = read_run(tmp_path / "logs" / "version_0", "run")
    kept = written._health._record.run()
    for tag in ("weight_rms/max", "orthogonality_error/mean", "train/loss", "val/loss"):
        assert [step for step, _ in kept.scalars[tag]] == [step for step, _ in run.scalars[tag]], tag


def test_a_long_record_keeps_what_judges_a_run() -> None:
    record = Record()
    for step in range(3 * MOST_POINTS):
        record.add(step, {"size": 9.0 if step == 101 else 1.0, "loss": float("nan") if step == 203 else 1.0})
    run = record.run()
    assert len(run.scalars["size"]) <= MOST_POINTS
    assert max(run.values("size")) == 9.0
    assert any(map(math.isnan, run.values("loss")))
    assert run.scalars["size"][-1][0] == 3 * MOST_POINTS - 1
