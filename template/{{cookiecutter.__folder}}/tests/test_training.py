"""Test the program through its command line."""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_muon.cli import MuonCLI, main

Run = Callable[..., MuonCLI]

CONFIGS = Path(__file__).parents[1] / "configs"
# QKClip refuses a model with QK-norm, which bounds the logits by itself, and one without attention.
OTHERS = {"strategy", "qk_clip"}
PRESETS = sorted(path for path in CONFIGS.rglob("*.yaml") if OTHERS.isdisjoint({path.parent.name, path.stem}))
# Presets of different folders go together: the first of each folder, the second of each, … Those for debugging stand
# alone, because they turn others off.
FOLDERS = sorted({path.parent for path in PRESETS} - {CONFIGS / "debug"})
ROWS = zip_longest(*([path for path in PRESETS if path.parent == folder] for folder in FOLDERS))
TOGETHER = [*([path for path in row if path] for row in ROWS), *([path] for path in CONFIGS.glob("debug/*.yaml"))]
STRATEGIES = sorted(path for path in CONFIGS.glob("strategy/*.yaml") if path.stem != "fsdp")  # fsdp needs a GPU
# What presets need that is not installed with the project.
NEEDS = {"wandb": "wandb", "mlflow": "mlflow", "soap": "pytorch_optimizer", "shampoo": "pytorch_optimizer"}


def test_a_run_is_logged_and_reported(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run("fit", "--trainer.max_steps=30", "--trainer.log_every_n_steps=10")
    events = EventAccumulator(fitted.trainer.log_dir).Reload().Tags()
    assert {f"{card}/text_summary" for card in ("watch/routing", "watch/config")} <= set(events["tensors"])
    monitors = {f"watch/{name}" for name in ("weight_rms/max", "orthogonality_error/mean", "weight_decay/matrix")}
    seen_first = {"at_a_glance/loss", "at_a_glance/val_loss"}
    assert {"lr-MuonAdamW/matrix", "train/loss", "val/loss"} | monitors | seen_first <= set(events["scalars"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(args=["report", "logs", "--all"])
    assert "│ val/loss, final" in capsys.readouterr().out
    page = (tmp_path / "logs" / "report" / "report.md").read_text()
    assert "| weight RMS, largest in the last quarter | under 1 |" in page


def test_a_run_continues_exactly_where_its_checkpoint_was_written(run: Run, tmp_path: Path) -> None:
    arguments = ["--trainer.max_steps=7", "--trainer.val_check_interval=4", "--trainer.limit_val_batches=1"]
    straight = run("fit", *arguments)
    checkpoint = next(tmp_path.rglob("step=4*.ckpt"))
    resumed = run("fit", *arguments, f"--ckpt_path={checkpoint}")
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight.trainer.callback_metrics["train/loss"] == resumed.trainer.callback_metrics["train/loss"]


@pytest.mark.parametrize("presets", TOGETHER, ids=lambda row: " ".join(path.stem for path in row))
def test_every_preset_trains(run: Run, presets: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    there = [path for path in presets if path.stem not in NEEDS or find_spec(NEEDS[path.stem])]
    options = [f"--config={path}" for path in there]
    cli = run("fit", *options, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
    assert cli.trainer.global_step == 2
    assert all(p.isfinite().all() for p in cli.model.parameters())


@pytest.mark.parametrize("preset", STRATEGIES, ids=lambda path: path.stem)
def test_every_strategy_trains(run: Run, preset: Path) -> None:
    plain = ["--trainer.callbacks=null", "--model.optimizer=AdamW"]
    try:
        cli = run("fit", f"--config={preset}", *plain, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
        assert cli.trainer.global_step == 2
        assert all(p.isfinite().all() for p in cli.model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_value_that_cannot_work_is_refused_in_a_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("validate", "--trainer.accumulate_grad_batches=0")
    line = "error: trainer.accumulate_grad_batches must be at least 1, got 0"
    assert capsys.readouterr().err.splitlines()[-1] == line


PLATEAU = ["--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss"]


@pytest.mark.parametrize("options", [["--model.optimizer=AdamW"], ["--trainer.logger=false"], PLATEAU])
def test_variants_train(run: Run, options: list[str]) -> None:
    assert run("fit", *options, "--trainer.max_steps=2", "--trainer.limit_val_batches=1").trainer.global_step == 2
