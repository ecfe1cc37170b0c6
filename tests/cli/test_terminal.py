"""What a run shows on the terminal: its progress and its end, and none of Lightning's noise."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, RichModelSummary, TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_muon.callbacks import ParameterSummary, StepProgressBar
from lightning_muon.cli.terminal import hush_lightning
from tests.cli.conftest import RunTiny

SHOWN = ["--trainer.enable_progress_bar=true", "--trainer.enable_model_summary=true", "--trainer.log_every_n_steps=2"]


class Warns(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warnings.warn("the data look odd", stacklevel=2)
        rank_zero_warn("a gradient is missing")
        rank_zero_info("once a run")


@pytest.fixture(autouse=True)
def _levels_as_before() -> Any:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def callbacks_of(trainer: Trainer, kind: type[Any]) -> list[type]:
    return [type(one) for one in trainer.callbacks if isinstance(one, kind)]  # type: ignore[attr-defined]


def test_a_line_at_each_logged_step_and_a_summary_of_the_model(
    run: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", *SHOWN)
    output, errors = capsys.readouterr()
    steps = [line.split("  ")[0] for line in output.splitlines() if line.startswith("step")]
    assert steps == ["step 1/4", "step 2/4", "step 4/4"]
    assert "25 parameters" in output
    assert not any(word in output + errors for word in ("GPU available", "Tip:", "already configured", "LeafSpec"))


def test_what_the_user_gives_stays(run: RunTiny) -> None:
    own = ["--trainer.callbacks+=TQDMProgressBar", "--trainer.callbacks+=RichModelSummary"]
    trainer = run("fit", *SHOWN, *own, "--trainer.max_steps=1").trainer
    assert callbacks_of(trainer, ProgressBar) == [TQDMProgressBar]
    assert callbacks_of(trainer, RichModelSummary) == [RichModelSummary]
    off = run("fit", "--trainer.max_steps=1").trainer  # as the default config says
    assert callbacks_of(off, ProgressBar) == callbacks_of(off, RichModelSummary) == []
    on = run("validate", *SHOWN).trainer
    assert callbacks_of(on, ProgressBar) == [StepProgressBar]
    assert callbacks_of(on, RichModelSummary) == [ParameterSummary]


def test_quiet_shows_warnings_and_the_end(run: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run("fit", "--quiet", *SHOWN, "--trainer.callbacks+=TQDMProgressBar", f"--trainer.callbacks+={__name__}.Warns")
    output, errors = capsys.readouterr()
    assert output.split()[:3] == ["after", "4", "steps"]
    assert errors == ""
    assert {str(one.message) for one in told} >= {"the data look odd", "a gradient is missing"}


def test_the_end_says_how_good_how_healthy_where_and_what_next(
    run: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = "{class_path: TensorBoardLogger, init_args: {save_dir: logs, name: null, default_hp_metric: false}}"
    best = "{class_path: ModelCheckpoint, init_args: {monitor: val/loss, save_last: true}}"
    options = [f"--trainer.logger={logger}", "--trainer.enable_checkpointing=true", f"--trainer.callbacks+={best}"]
    options.append("--trainer.callbacks+=MuonDashboard")
    trainer = run("fit", *options, "--trainer.val_check_interval=2").trainer
    output = capsys.readouterr().out
    [checkpoint] = trainer.checkpoint_callbacks
    score = f"{float(checkpoint.best_model_score):.4g}"  # type: ignore[attr-defined]
    row = next(line for line in output.splitlines() if "val/loss" in line)
    assert row.replace("│", " ").split() == ["val/loss", score, score]
    lines = dict(line.split(":", 1) for line in output.splitlines() if ": " in line)
    assert lines["health"].strip() == "too short to judge: 4 steps; a verdict needs 60"
    assert lines["folder"].strip() == "logs/version_0"
    assert lines["checkpoint"].strip() == "logs/version_0/checkpoints/last.ckpt"
    assert Path(lines["best"].strip()).exists()
    assert lines["report"].endswith("tiny.py report logs/version_0")
    assert lines["picture"].strip() == "logs/version_0/health.png"


def test_the_end_names_no_measurements(run: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1", "--trainer.callbacks+=SpeedMonitor")
    output = capsys.readouterr().out
    assert "train/loss" in output
    assert "throughput" not in output


def test_filters_concern_what_nobody_can_change() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        hush_lightning()
        rank_zero_warn("`isinstance(treespec, LeafSpec)` is deprecated, use something else")
        rank_zero_warn("the loss is odd")
    assert [str(one.message) for one in told] == ["the loss is odd"]
    keep = logging.getLogger("lightning.pytorch.utilities.rank_zero").filter
    messages = {
        "GPU available: False, used: False": False,
        "GPU available: True (cuda), used: True": True,
        "Restored all states from the checkpoint at x.ckpt": True,
        "`Trainer.fit` stopped: No training batches.": True,
        "[rank: 1] Seed set to 42": False,
        "[rank: 0] Seed set to 42": True,
    }
    records = {text: logging.LogRecord("", logging.INFO, "", 0, text, None, None) for text in messages}
    assert {text: bool(keep(record)) for text, record in records.items()} == messages
