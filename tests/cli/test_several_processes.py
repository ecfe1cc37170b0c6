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


# Lightning starts the program a second time, for the other rank; both ranks fit, then resume.
TWO_FITS = """
from lightning_muon.cli import main

TRAINER = ["accelerator=cpu", "devices=2", "strategy=ddp", "max_steps=2"]
ARGUMENTS = ["fit", *(f"--trainer.{option}" for option in TRAINER)]
CHECKPOINT = "lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"
for further in ([], [f"--ckpt_path={CHECKPOINT}", "--trainer.max_steps=3"]):
    main("mine.Module", "mine.Data", args=[*ARGUMENTS, *further])
"""


# Generated projects do the same in tests/template/test_several_devices.py.
@pytest.mark.slow
def test_fit_saves_its_config_and_resumes_on_two_ranks() -> None:
    Path("mine.py").write_text(MODULE)
    Path("two_fits.py").write_text(TWO_FITS)
    command = [sys.executable, "two_fits.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert sorted(str(path) for path in Path().rglob("config*.yaml")) == [
        f"lightning_logs/version_{number}/config.yaml" for number in range(2)
    ]
    progress = [line.split("  ")[0] for line in run.stdout.splitlines() if line.startswith("step")]
    assert progress == ["step 1/2", "step 2/2", "step 3/3"], "of rank 0 alone, and the resumed run goes on at its step"


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


# An interpreter of its own: 5 s, for one line of the end of the program.
@pytest.mark.slow
def test_threads_of_the_group_end_before_the_interpreter() -> None:
    Path("mine.py").write_text(MODULE)
    run = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=70, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "dropped" in run.stdout
