"""Test the program through its command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_muon.cli import MuonCLI, main

Run = Callable[..., MuonCLI]

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "strategy")
STRATEGIES = sorted(path for path in CONFIGS.glob("strategy/*.yaml") if path.stem != "fsdp")  # fsdp needs a GPU


def test_it_learns_and_writes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run("fit", "--trainer.max_steps=60", "--model.optimizer.lr=0.02")
    metrics = fitted.trainer.callback_metrics
    assert metrics["val/loss"] < 0.8 * metrics["val/unigram_loss"]
    assert metrics["val/perplexity"] == pytest.approx(float(metrics["val/loss"].exp()), rel=1e-3)

    logged = EventAccumulator(fitted.trainer.log_dir).Reload().Tags()["scalars"]
    rates = {f"lr-MuonAdamW/{role}" for role in ("matrix", "embedding", "head", "vector")}
    monitors = {"weight_rms/max", "bf16_headroom/min", "orthogonality_error/mean", "weight_decay/matrix"}
    texts = {f"{card}/text_summary" for card in ("routing", "config")}
    assert texts <= set(EventAccumulator(fitted.trainer.log_dir).Reload().Tags()["tensors"])
    assert rates | monitors | {"train/loss", "val/loss", "val/perplexity", "val/unigram_loss"} <= set(logged)

    capsys.readouterr()
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    run("predict", f"--ckpt_path={checkpoint}", "--data.prompt=the ", "--model.sample_bytes=30")
    written = capsys.readouterr().out
    assert "the " in written
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]

    with pytest.raises(SystemExit):
        main(args=["report", "logs"])
    assert "│ val/loss, final" in capsys.readouterr().out
    assert "| weight RMS, peak of the largest | under 1 |" in (tmp_path / "logs" / "report" / "report.md").read_text()


def test_a_run_continues_exactly_where_its_checkpoint_was_written(run: Run, tmp_path: Path) -> None:
    arguments = ["--trainer.max_steps=7", "--trainer.val_check_interval=4", "--trainer.limit_val_batches=1"]
    straight = run("fit", *arguments)
    checkpoint = next(tmp_path.rglob("step=4*.ckpt"))
    resumed = run("fit", *arguments, f"--ckpt_path={checkpoint}")
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight.trainer.callback_metrics["train/loss"] == resumed.trainer.callback_metrics["train/loss"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_preset_trains(run: Run, preset: Path) -> None:
    cli = run("fit", f"--config={preset}", "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
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


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--model.temperature=.nan", "temperature must be over 0 and finite, got nan"),
        ("--model.temperature=0", "temperature must be over 0 and finite, got 0.0"),
        ("--model.sample_bytes=-1", "sample_bytes must be at least 0, got -1"),
        ("--model.net.heads=0", "heads must be at least 1, got 0"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1, got 0"),
    ],
)
def test_values_that_cannot_work_are_refused_in_a_line(
    run: Run, capsys: pytest.CaptureFixture[str], option: str, line: str
) -> None:
    with pytest.raises(SystemExit):
        run("predict", option)
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"


PLATEAU = ["--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss"]


@pytest.mark.parametrize(
    "options", [["--model.net.tied_embeddings=true"], ["--model.optimizer=AdamW"], ["--trainer.logger=false"], PLATEAU]
)
def test_variants_train(run: Run, options: list[str]) -> None:
    assert run("fit", *options, "--trainer.max_steps=2", "--trainer.limit_val_batches=1").trainer.global_step == 2
