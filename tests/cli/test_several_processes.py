"""Programs on several processes: no rank asks for a collective alone, and none is taken down at its end."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(150)

MODULE = """
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

class Module(BoringModel):
    pass

class Data(BoringDataModule):
    pass
"""


def test_fit_saves_its_config_and_resumes_on_two_ranks() -> None:
    Path("mine.py").write_text(MODULE)
    program = [sys.executable, "-m", "lightning_muon.cli", "fit", "--model=mine.Module", "--data=mine.Data"]
    trainer = ["accelerator=cpu", "devices=2", "strategy=ddp", "max_steps=2", "enable_progress_bar=false"]
    command = [*program, *(f"--trainer.{option}" for option in trainer)]
    checkpoint = "lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"
    for arguments in ([], [f"--ckpt_path={checkpoint}", "--trainer.max_steps=3"]):
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=70, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
    assert sorted(str(path) for path in Path().rglob("config*.yaml")) == [
        f"lightning_logs/version_{number}/config.yaml" for number in range(2)
    ]


# A thread that is last to use a tensor, as gloo's are: it needs the interpreter once more after the last line.
ENDING = """
import threading, time
import torch.distributed as dist
from lightning_muon.cli import MuonCLI

def drop():
    time.sleep(0.05)
    print("dropped", flush=True)

MuonCLI(args=["fit", "--model=mine.Module", "--data=mine.Data", "--trainer.accelerator=cpu", "--trainer.max_steps=1"])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
threading.Thread(target=drop, daemon=True).start()
"""


def test_threads_of_the_group_end_before_the_interpreter() -> None:
    Path("mine.py").write_text(MODULE)
    run = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=70, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "dropped" in run.stdout
