"""A generated project on two processes: each strategy gives the weights and the validation loss of one device."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.strategies import consolidate_checkpoint
from tests.processes import launch, run_module

PROGRAM = Path(__file__).with_name("two_processes.py")
CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 4
  val_check_interval: 2
  enable_progress_bar: false
  log_every_n_steps: 2
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_top_k: -1, monitor: val/loss, filename: "{step}"}
    - class_path: lightning_muon.callbacks.WeightRMSMonitor
    - class_path: lightning_muon.callbacks.OrthogonalityMonitor
    - class_path: lightning_muon.callbacks.AutoWeightDecay
    - class_path: lightning_muon.callbacks.MuonDashboard
model:
  net:
    class_path: GPT
    init_args: {dim: 16, depth: 2, heads: 2, context: 32}
  context: 32
  optimizer:
    class_path: lightning_muon.optim.MuonAdamW
    init_args: {lr: 0.01, eps: 1.0e-3, orthogonalizer_options: {dtype: float32}}
"""
FSDP_ON_CPU = """
trainer:
  strategy:
    class_path: two_processes.FSDPOnCPU
    init_args:
      auto_wrap_policy:
        class_path: lightning_muon.strategies.BlockWrapPolicy
      state_dict_type: sharded
"""
# Where a run is saved, its preset, and from where it goes on.
PLAN = [
    *((name, name, None) for name in ("ddp", "fsdp2", "hsdp", "fsdp")),
    ("fsdp resumed", "fsdp", "fsdp"),
    ("fsdp2 from one", "fsdp2", "one"),
    ("hsdp from fsdp2", "hsdp", "fsdp2"),
    ("fsdp2 from fsdp", "fsdp2", "fsdp"),
]


def fit(folder: str, *arguments: str) -> list[str]:
    return ["fit", "--config=small.yaml", f"--trainer.logger.save_dir={folder}", *arguments]


def checkpoint(folder: str, step: int) -> str:
    return f"{folder}/version_0/checkpoints/step={step}.ckpt"


def call(project: Path, *arguments: str, code: int = 0) -> str:
    """Run the command line of the project; returns all that it wrote."""
    finished = run_module("my_muon_project", *arguments, folder=project, path=[project / "src"])
    assert finished.returncode == code, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout + finished.stderr


def by_name(file: Path) -> dict[str, Any]:
    """Weights and optimizer state of a plain checkpoint."""
    loaded = torch.load(file, weights_only=True)
    (state,) = loaded["optimizer_states"]
    values = dict(loaded["state_dict"])
    for group in state["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            values |= {f"{name}: {key}": value for key, value in state["state"][number].items()}
    return values


# All of them take 20 s; tests/strategies has every pair outside of a project.
@pytest.mark.parametrize(
    "plan",
    [[run for run in PLAN if run[0] in {"ddp", "fsdp2", "fsdp2 from one"}], pytest.param(PLAN, marks=pytest.mark.slow)],
)
def test_each_strategy_trains_and_resumes_as_one_device(
    baked_project: Path, tmp_path: Path, plan: list[tuple[str, str, str | None]]
) -> None:
    project = shutil.copytree(baked_project, tmp_path / "a project")
    (project / "small.yaml").write_text(CONFIG)
    (project / "configs" / "strategy" / "fsdp.yaml").write_text(FSDP_ON_CPU)
    call(project, *fit("one", "--data.batch_size=8", "--data.val_samples=16"))

    half = ["--data.batch_size=4", "--data.val_samples=16", "--trainer.devices=2"]
    runs = []
    for folder, preset, start in plan:
        options = [f"--ckpt_path={checkpoint(start, 2)}"] if start else []
        options += ["--trainer.strategy.replicate_size=2"] if preset == "hsdp" else []  # as with two nodes
        runs.append(fit(folder, f"--config=configs/strategy/{preset}.yaml", *half, *options))
    launch(PROGRAM, "run", 2, *runs, folder=project, path=[project / "src"], process_group=False)

    expected = by_name(project / checkpoint("one", 4))
    for folder, preset, _ in plan:
        path = project / checkpoint(folder, 4)
        assert path.is_dir() == (preset != "ddp")
        if path.is_dir():
            assert (path / "checksums.json").is_file()  # also of Lightning's FSDPStrategy
            consolidate_checkpoint(path, path.with_suffix(".plain"))
            path = path.with_suffix(".plain")
        found = by_name(path)
        assert found.keys() >= expected.keys()
        # FSDP1 saves the same state for each parameter: zeros where Muon or AdamW has none.
        assert all(preset == "fsdp" and not found[key].any() for key in found.keys() - expected.keys())
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=f"{key} of {folder}")

    sharded = checkpoint("fsdp2", 4)
    refused = call(project, "validate", f"--ckpt_path={sharded}", code=2)
    assert f"consolidate {sharded} <file>" in refused
    call(project, "consolidate", sharded, "plain.ckpt")
    assert by_name(project / "plain.ckpt").keys() == expected.keys()
