"""The command ``sweep``, with real runs of Lightning."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from lightning_muon.cli import main
from tests.processes import Running, run_module

pytestmark = pytest.mark.timeout(120)

MODULE = """
import os, time
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Module(LightningModule):
    def __init__(self, lr: float = 0.1, width: int = 2):
        super().__init__()
        self.lr, self.net = lr, nn.Linear(2, width)

    def loss(self, batch):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return (self.net(batch[0]) - 1).square().mean()

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.tensor([[0.5, 1.0]] * 12)))

    val_dataloader = train_dataloader
"""
CONFIG = """
seed_everything: 3
trainer:
  max_steps: 8
  accelerator: cpu
  devices: 1
  val_check_interval: 4
  limit_val_batches: 1
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {save_last: true, save_top_k: 0, every_n_train_steps: 1}
"""
FIT = ["--model=mine.Module", "--data=mine.Data", "--config=mine.yaml"]
SWEEP = ["sweep", "--vary", "model.lr=0.1,0.02", *FIT]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return tmp_path


def values(folder: Path) -> dict[str, float]:
    trials = json.loads((folder / "trials.json").read_text())
    assert [trial["status"] for trial in trials] == ["finished"] * 2, trials
    return {trial["name"]: trial["value"] for trial in trials}


def test_a_killed_sweep_goes_on_within_its_runs_and_ends_alike(folder: Path) -> None:
    whole = run_module("lightning_muon.cli", *SWEEP, "--study=whole", "--jobs=2", folder=folder)
    assert whole.returncode == 0, whole.stderr
    last = folder / "killed/runs/lr=0.1/checkpoints/last.ckpt"
    with Running("lightning_muon.cli", *SWEEP, "--study=killed", folder=folder, environment={"SLOW": "0.1"}) as killed:
        until = time.monotonic() + 60
        while not last.exists():
            assert killed.code is None, killed.output
            assert time.monotonic() < until, killed.output
            time.sleep(0.02)
        killed.send(signal.SIGKILL)
        killed.wait(10)
    # The other run as if it were killed after its last checkpoint, from which nothing is left to train.
    shutil.copytree(folder / "whole/runs/lr=0.02", folder / "killed/runs/lr=0.02", dirs_exist_ok=True)
    going_on = run_module("lightning_muon.cli", *SWEEP, "--study=killed", folder=folder)
    assert going_on.returncode == 0, going_on.stderr
    assert values(folder / "killed") == values(folder / "whole")
    outputs = [(folder / f"killed/runs/lr={lr}/output.txt").read_text() for lr in (0.1, 0.02)]
    assert [output.count("after 8 steps") for output in outputs] == [1, 1]
    assert f"--ckpt_path last: {last}" in outputs[0]
    assert "--ckpt_path last" not in outputs[1]
    best = min(values(folder / "whole").items(), key=lambda item: item[1])[0].partition("=")[2]
    assert f"lightning_muon.cli fit {' '.join(FIT)} --model.lr={best}\n" in whole.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_that_is_killed_twenty_times_ends_alike(folder: Path) -> None:
    """Twenty starts of Lightning; with runs of milliseconds the default tests do the same."""
    whole = run_module("lightning_muon.cli", *SWEEP, "--study=whole", folder=folder)
    assert whole.returncode == 0, whole.stderr
    draw = random.Random(0)  # noqa: S311
    command = ["lightning_muon.cli", *SWEEP, "--study=killed", "--jobs=2"]
    for _ in range(20):
        with Running(*command, folder=folder, environment={"SLOW": "0.2"}) as killed:
            killed.wait(draw.uniform(1, 8))
            killed.send(signal.SIGKILL)
            killed.wait(10)
    going_on = run_module(*command, folder=folder)
    assert going_on.returncode == 0, going_on.stderr
    assert values(folder / "killed") == values(folder / "whole")
    lines = [json.loads(line) for line in (folder / "killed/journal.jsonl").read_text().splitlines()]
    assert sorted(line["trial"] for line in lines if line.get("event") == "finished") == ["lr=0.02", "lr=0.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary=model.lrr=1,2"], "unknown key 'model.lrr' for mine.Module; did you mean 'model.lr'?"),
        (["--vary=model.width=2,3,a"], "model.width: expected a whole number, got 'a'"),
    ],
)
def test_a_wrong_command_is_one_line_before_any_run(folder: Path, options: list[str], message: str) -> None:
    refused = run_module("lightning_muon.cli", "sweep", *options, *FIT, folder=folder)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {message}")
    assert refused.stderr.count("\n") == 1
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --vary"),
        (["--vary", "lr"], "argument --vary: lr: expected KEY="),
        (["--vary", "lr=1", "--vary", "lr=2"], "--vary lr is there twice"),
        (["--vary", "lr=1..2"], "--vary lr: a range has no end of values: add --trials n to search it, or a number of"),
        (["--vary", "lr=1", "--jobs", "0"], "argument --jobs: must be a whole number of at least 1"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args=["sweep", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
