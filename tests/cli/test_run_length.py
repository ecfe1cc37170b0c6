"""Epochs or steps, whichever was asked for last, and schedules of that length."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.cli import MuonCLI, main
from lightning_muon.data import EpochDataModule, EpochLoader
from lightning_muon.optim import OneCycle, WarmupCosine
from tests.cli.conftest import CHECKPOINTS, DEFAULT_CONFIG, TinyModule

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)

COSINE = ["--model.lr_scheduler", "WarmupCosine", "--model.lr_scheduler.warmup", "0.0"]
QUICK = ["--trainer.limit_val_batches", "0"]


def schedule_of(cli: MuonCLI) -> WarmupCosine | OneCycle:
    schedule = cli.trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, (WarmupCosine, OneCycle))
    return schedule


def rates_of(cli: MuonCLI) -> list[float]:
    return [group["lr"] for group in cli.trainer.optimizers[0].param_groups]


def test_epochs_release_the_steps_of_the_default(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch has 8 steps, the default is 4 steps."""
    cli = run("fit", "--trainer.max_epochs", "2", *COSINE, *QUICK)
    assert cli.trainer.global_step == 16
    assert schedule_of(cli).total_steps == 16
    assert rates_of(cli) == pytest.approx([0.0, 0.0])
    line = "trainer.max_epochs 2 ends the run: trainer.max_steps 4 does not apply (in default.yaml)\n"
    assert line in capsys.readouterr().err


def test_steps_release_the_epochs_of_a_config(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    default = Path("default.yaml")
    default.write_text(default.read_text().replace("max_steps: 4", "max_epochs: 1"))
    arguments = ["--trainer.max_steps", "10", *COSINE, *QUICK]
    cli = run("fit", *arguments, "--trainer.default_root_dir", "here")
    assert (cli.trainer.global_step, schedule_of(cli).total_steps) == (10, 10)
    line = "trainer.max_steps 10 ends the run: trainer.max_epochs 1 does not apply (in default.yaml)\n"
    assert line in capsys.readouterr().err
    # The saved config repeats it, and may be changed in the same way.
    again = run("fit", "--config", "here/config.yaml", "--trainer.max_epochs", "2")
    assert (again.trainer.global_step, schedule_of(again).total_steps) == (16, 16)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_epochs", "1", "--trainer.max_steps", "6"], 6),  # whichever comes first
        (["--trainer.max_epochs", "1", "--trainer.max_steps", "9"], 8),
        (["--trainer.max_epochs", "-1"], 4),
        (["--trainer.max_epochs", "1", "--trainer.accumulate_grad_batches", "3"], 3),
        ([], 4),
    ],
)
def test_what_ends_the_run(run: Run, options: list[str], steps: int) -> None:
    cli = run("fit", *options, *COSINE, *QUICK)
    assert (cli.trainer.global_step, schedule_of(cli).total_steps) == (steps, steps)


def test_a_given_length_stays(run: Run) -> None:
    assert schedule_of(run("fit", *COSINE, "--model.lr_scheduler.total_steps", "40", *QUICK)).total_steps == 40


def test_one_cycle_goes_up_to_the_rate_of_the_optimizer(run: Run) -> None:
    cli = run("fit", "--model.lr_scheduler", "OneCycle", "--trainer.max_epochs", "1", *QUICK)
    assert schedule_of(cli).total_steps == 8
    assert [group["max_lr"] for group in cli.trainer.optimizers[0].param_groups] == [0.125, 0.125]


def test_a_run_without_a_length_has_no_such_schedule(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1", *COSINE)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: model.lr_scheduler: WarmupCosine needs the length of the run, and neither steps nor epochs limit it: "
        "give --trainer.max_steps, or --model.lr_scheduler.total_steps"
    )


def test_a_longer_run_has_a_longer_schedule_and_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", *COSINE, "--config", "checkpoints.yaml", "--trainer.default_root_dir", "first")
    checkpoint = str(next(Path("first").rglob("last.ckpt")))
    more = ["--trainer.max_epochs", "1", *QUICK]
    straight = run("fit", *COSINE, *more)
    assert "in the checkpoint" not in capsys.readouterr().err
    resumed = run("fit", "--ckpt_path", checkpoint, "--trainer.max_steps", "6", *QUICK)
    error = capsys.readouterr().err
    assert "model.lr_scheduler.total_steps: 4 in the checkpoint, 6 used: the schedule goes on where the new" in error
    resumed = run("fit", "--ckpt_path", checkpoint, *more)
    assert "model.lr_scheduler.total_steps: 4 in the checkpoint, 8 used" in capsys.readouterr().err
    assert rates_of(resumed) == pytest.approx(rates_of(straight))
    again = run("fit", "--ckpt_path", checkpoint, *more, "--model.lr_scheduler.total_steps", "4")
    assert "total_steps" not in capsys.readouterr().err
    assert schedule_of(again).total_steps == 4


class EpochData(EpochDataModule):
    def train_dataloader(self) -> EpochLoader:
        return self.train_loader(torch.arange(40.0).unsqueeze(1))


class Recorder(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.losses.extend(batch.flatten().tolist())  # the samples
        return self(batch / 40).square().mean()


@pytest.mark.usefixtures("_without_a_process_group_afterwards")
@pytest.mark.parametrize("strategy", ["auto", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_run_that_goes_on_in_mid_epoch_counts_its_length_and_keeps_its_place(
    strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To know the length, Lightning loads the data before the place in the epoch is restored."""
    Path("often.yaml").write_text(CHECKPOINTS.replace("save_top_k: 0", "save_top_k: -1"))
    arguments = ["--model.dim=1", "--data.batch_size=4", "--trainer.max_epochs=2", f"--trainer.strategy={strategy}"]
    Path("default.yaml").write_text(DEFAULT_CONFIG.replace("data:\n  dim: ${model.dim}", ""))
    schedule = [*COSINE, "--model.lr_scheduler.floor=0.5"]
    arguments = ["fit", "--config=often.yaml", *arguments, *schedule, "--trainer.limit_val_batches=0"]

    def fit(*more: str) -> MuonCLI:
        return main(Recorder, EpochData, default_config="default.yaml", args=[*arguments, *more])

    straight = fit()
    for step in (3, 10, 14):
        resumed = fit(f"--ckpt_path={next(Path().rglob(f'*step={step}.ckpt'))}")
        assert resumed.trainer.global_step == 20
        assert resumed.model.losses == straight.model.losses[4 * step :]
        assert rates_of(resumed) == rates_of(straight)
    assert "total_steps" not in capsys.readouterr().err
