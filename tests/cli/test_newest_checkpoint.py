"""``--ckpt_path last``: the newest checkpoint of earlier runs, in whatever folders their logger makes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningModule

from lightning_muon.cli import MuonCLI
from lightning_muon.cli.resume.callback import KeepCommandLineOnResume
from lightning_muon.cli.resume.plan import ResumePlan

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)

FIT = ["fit", "--config=checkpoints.yaml", "--ckpt_path=last"]
CSV = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
FRESH = "--ckpt_path last: there is no checkpoint yet, the run starts afresh\n"


@pytest.mark.parametrize(
    ("logger", "first"),
    [
        ([*CSV, "--trainer.logger.name=mine"], "logs/mine/version_0"),
        pytest.param([*CSV, "--trainer.logger.name="], "logs/version_0", marks=pytest.mark.slow),
        pytest.param([*CSV, "--trainer.logger.version=one"], "logs/lightning_logs/one", marks=pytest.mark.slow),
        pytest.param(
            ["--trainer.logger=true", "--trainer.default_root_dir=root"],
            "root/lightning_logs/version_0",
            marks=pytest.mark.slow,
        ),
        (["--trainer.default_root_dir=root"], "root"),
    ],
)
def test_it_goes_on_where_the_earlier_run_was(
    run: Run, capsys: pytest.CaptureFixture[str], logger: list[str], first: str
) -> None:
    assert run(*FIT, *logger, "--trainer.max_steps=2").trainer.global_step == 2
    assert FRESH in capsys.readouterr().err
    resumed = run(*FIT, *logger, "--model.scale=0.5")
    assert resumed.trainer.global_step == 4
    assert len(resumed.model.losses) == 2
    error = capsys.readouterr().err
    assert f"--ckpt_path last: {first}/checkpoints/last.ckpt\n" in error
    assert "model.scale: 1.0 in the checkpoint, 0.5 used\n" in error
    # The newest of two.
    assert len(run(*FIT, *logger, "--trainer.max_steps=5").model.losses) == 1


def test_what_cannot_be_read_is_skipped(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    torn, weights = Path("first/checkpoints/torn.ckpt"), Path("first/checkpoints/weights.ckpt")
    torn.write_bytes(Path(saved).read_bytes()[:1000])
    shutil.copy(saved, weights)
    os.utime(saved, (1, 1))
    os.utime(weights, (2, 2))
    run(*FIT, "--trainer.default_root_dir=first", "--trainer.max_steps=5")
    error = capsys.readouterr().err
    assert f"--ckpt_path last: '{torn}' is skipped: --ckpt_path: the checkpoint '{torn}' is damaged" in error
    assert f"--ckpt_path last: {weights}\n" in error


def test_all_ranks_go_on_from_the_same() -> None:
    strategy = SimpleNamespace(broadcast=lambda _: "newer.ckpt")
    trainer: Any = SimpleNamespace(strategy=strategy, global_rank=1)
    callback = KeepCommandLineOnResume(ResumePlan(Path("older.ckpt")))
    with pytest.raises(ValueError, match=r"from 'newer\.ckpt', rank 1 from 'older\.ckpt'"):
        callback.setup(trainer, LightningModule(), "fit")


@pytest.mark.usefixtures("saved")
def test_only_fit_starts_afresh(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", "--ckpt_path=last", "--trainer.default_root_dir=first").trainer.state.finished
    with pytest.raises(SystemExit) as stop:
        run("validate", "--ckpt_path=last", "--trainer.default_root_dir=second")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --ckpt_path last: there is no checkpoint yet"


def test_the_checkpoint_in_use_is_in_the_saved_config(run: Run, saved: str) -> None:
    logger = ["--trainer.default_root_dir=first", *CSV, "--trainer.logger.save_dir=first"]
    dirpath = "trainer: {callbacks+: [{class_path: ModelCheckpoint, init_args: {dirpath: first/checkpoints}}]}"
    Path("dirpath.yaml").write_text(dirpath)
    arguments = ["--config=dirpath.yaml", "--trainer.enable_checkpointing=true", "--trainer.max_steps=5"]
    cli = run("fit", "--ckpt_path=last", *logger, *arguments)
    assert cli.config.fit.ckpt_path == saved


def test_what_a_kill_between_two_renames_has_left_is_found(
    run: Run, saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint in Path(saved).parent.glob("*.ckpt"):
        checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.replaced"))
    run(*FIT, "--trainer.default_root_dir=first", "--trainer.max_steps=5")
    assert "--ckpt_path last: first/checkpoints/" in capsys.readouterr().err
    assert Path(saved).exists()
