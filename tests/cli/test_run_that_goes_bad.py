"""A run that goes bad ends with one line, which has the command to resume, and with exit code 1."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_muon.cli import MuonCLI
from lightning_muon.cli.output import resume_command

RunTiny = Callable[..., MuonCLI]

GUARDED = """
trainer:
  callbacks+:
    - class_path: lightning_muon.callbacks.RunGuard
"""
# Weights of 1e30 are finite, and the gradients that follow from them are not.
HUGE = "--model.optimizer.lr=1e30"


def test_it_ends_with_the_command_to_resume(run: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    Path("guarded.yaml").write_text(GUARDED)
    arguments = ["fit", "--config", "checkpoints.yaml", "--config", "guarded.yaml", "--trainer.log_every_n_steps", "1"]
    with pytest.raises(SystemExit) as ended:
        run(*arguments, "--trainer.default_root_dir=a b", HUGE)
    assert ended.value.code == 1
    output = capsys.readouterr()
    line = output.err.splitlines()[-1]
    assert line.startswith("error: RunGuard: in step 1 the norm of the gradient of hidden_layer.weight, ")
    assert "Traceback" not in output.err
    assert "checkpoint:" not in output.out, "no summary recommends what is bad"
    command = shlex.split(line.partition("Go on from it: ")[2])
    checkpoint = command[-1]
    assert f"the newest healthy checkpoint is '{checkpoint}' (after 1 steps)" in line
    cli = run(*command[command.index("fit") :], "--model.optimizer.lr=0.1")
    assert cli.trainer.global_step == 4


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


@pytest.mark.timeout(150)
def test_two_ranks_end_with_one_line() -> None:
    Path("two_ranks.py").write_text(ON_TWO_RANKS)
    command = [sys.executable, "two_ranks.py"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1, ended.stderr[-2000:]
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr[-2000:]
    assert errors[0].startswith("error: RunGuard: in step 4 the norm of the gradient of layer.weight")
    assert errors[0].endswith("no checkpoint was saved yet")
