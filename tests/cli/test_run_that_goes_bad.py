"""A run that goes bad ends with one line, which has the command to resume, and with exit code 1."""

import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_muon.cli import MuonCLI, main
from lightning_muon.cli.output import resume_command
from tests.cli.conftest import TinyData, TinyModule

GUARDED = """
trainer:
  callbacks+:
    - class_path: lightning_muon.callbacks.RunGuard
"""


class Spoilt(TinyModule):
    """Gets a NaN in the gradient of a step."""

    def __init__(
        self,
        spoilt_step: int = -1,
        dim: int = 4,
        hidden: int = 4,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(dim, hidden, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.spoilt_step = spoilt_step

    def on_after_backward(self) -> None:
        if self.global_step == self.spoilt_step:
            assert self.head.weight.grad is not None
            self.head.weight.grad[0, 0] = math.nan


def run(*args: str) -> MuonCLI:
    return main(Spoilt, TinyData, default_config="default.yaml", args=args)


def test_it_ends_with_the_command_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    Path("guarded.yaml").write_text(GUARDED)
    arguments = ["fit", "--config", "checkpoints.yaml", "--config", "guarded.yaml", "--trainer.log_every_n_steps", "1"]
    with pytest.raises(SystemExit) as ended:
        run(*arguments, "--trainer.default_root_dir=a b", "--model.spoilt_step=2")
    assert ended.value.code == 1
    output = capsys.readouterr()
    line = output.err.splitlines()[-1]
    assert line.startswith("error: RunGuard: in step 2 the norm of the gradient of head.weight is not finite; ")
    assert "Traceback" not in output.err
    assert "checkpoint:" not in output.out, "no summary recommends what is bad"
    command = shlex.split(line.partition("Go on from it: ")[2])
    assert f"the newest healthy checkpoint is '{command[-1]}' (after 2 steps)" in line
    cli = run(*command[command.index("fit") :], "--model.spoilt_step=-1")
    assert cli.trainer.global_step == 4
    assert len(cli.model.losses) == 2


def test_the_command_to_resume_replaces_an_earlier_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_muon.cli.output.program_name", lambda: "muon")
    for earlier in (["--ckpt_path", "old.ckpt"], ["--ckpt_path=old.ckpt"], []):
        args = ["fit", *earlier, "--model.name", "a b"]
        assert resume_command(args, "new.ckpt") == "muon fit --model.name 'a b' --ckpt_path new.ckpt"


# Lightning starts the program a second time, for the other rank.
ON_TWO_RANKS = """
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning_muon.cli import main

class Module(BoringModel):
    def on_before_optimizer_step(self, optimizer):
        if self.global_step == 3 and self.trainer.global_rank == 1:
            self.layer.weight.data[0] = float("nan")

if __name__ == "__main__":
    options = ["accelerator=cpu", "devices=2", "strategy=ddp", "max_steps=9", "enable_progress_bar=false"]
    further = ["logger=false", "log_every_n_steps=2", "callbacks+=RunGuard"]
    main(Module, BoringDataModule, args=["fit", *(f"--trainer.{option}" for option in options + further)])
"""


# That all ranks decide alike, tests/callbacks/test_run_guard_sharded.py holds.
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_two_ranks_end_with_one_line() -> None:
    Path("two_ranks.py").write_text(ON_TWO_RANKS)
    command = [sys.executable, "two_ranks.py"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1, ended.stderr[-2000:]
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr[-2000:]
    assert errors[0].startswith("error: RunGuard: in step 4 the norm of the gradient of layer.weight")
    assert errors[0].endswith("there is no healthy checkpoint")
