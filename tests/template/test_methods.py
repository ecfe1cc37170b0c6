"""Every method of `orthogonalize` trains a generated project for fifty steps, and resumes exactly from the middle."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from lightning_muon.optim.polar.orthogonalize import Orthogonalizer

STEPS, HALF = 50, 25
TRAIN = """
import json, logging, sys, warnings
from functools import partial
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch import Callback
from my_muon_project.data import TextData
from my_muon_project.module import TextModule
from lightning_muon.optim import MuonAdamW

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fit(method, steps, ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    optimizer = partial(MuonAdamW, lr=0.02, orthogonalizer=method, **options)
    module = TextModule(dim=32, depth=2, heads=2, context=32, optimizer=optimizer)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    watch = Losses()
    trainer = Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, callbacks=[watch],
                      enable_model_summary=False, **quiet)
    trainer.fit(module, TextData(context=32, batch_size=8), ckpt_path=ckpt_path, weights_only=False)
    return trainer, module, watch.losses


found = {}
steps, half = int(sys.argv[1]), int(sys.argv[2])
for method in sys.argv[3:]:
    _, whole, losses = fit(method, steps)
    trainer, _, _ = fit(method, half)
    trainer.save_checkpoint("half.ckpt")
    _, resumed, _ = fit(method, steps, ckpt_path="half.ckpt")
    equal = all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    found[method] = {"losses": losses, "equal": equal}
with open("found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.timeout(180)
def test_every_method_trains_and_resumes(baked_project: Path, tmp_path: Path) -> None:
    project = shutil.copytree(baked_project, tmp_path / "a project")
    methods = get_args(Orthogonalizer)
    command = [sys.executable, "-c", TRAIN, str(STEPS), str(HALF), *methods]
    finished = subprocess.run(
        command, cwd=project, env={**os.environ, "PYTHONPATH": "src"}, text=True, capture_output=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads((project / "found.json").read_text())
    assert set(found) == set(methods)
    for method, run in found.items():
        assert len(run["losses"]) == STEPS
        assert sum(run["losses"][-5:]) / 5 < 0.75 * run["losses"][0], method
        assert run["equal"], f"{method} does not resume exactly"
