"""Fixtures for the tests of all rooms. They import torch and Lightning where they use them, for a quick start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from tests.regression import Regression

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Use one thread and one seed: sums have one order, and a test draws the same numbers on every worker."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget where earlier tests in this process met: Lightning leaves the port, and its store may still listen."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def project_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`project_of(task)`: a project generated with the default answers otherwise; copy it before changing anything."""
    baked: dict[str, Path] = {}

    def generate(task: str) -> Path:
        if task not in baked:
            # A space in the path, because a user's may have one.
            folder = tmp_path_factory.mktemp(f"baked {task}")
            command = [sys.executable, "-m", "cookiecutter", str(REPOSITORY), "--no-input", "--default-config"]
            # cookiecutter writes answers and clones below the home folder: not below the user's.
            environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
            arguments = [*command, "--output-dir", str(folder), f"task={task}"]
            subprocess.run(arguments, env=environment, check=True, capture_output=True)
            baked[task] = folder / "my-muon-project"
        return baked[task]

    return generate


@pytest.fixture(scope="session")
def baked_project(project_of: Callable[[str], Path]) -> Path:
    """A project of the task text, the default; copy it before changing anything in it."""
    return project_of("text")


@pytest.fixture(scope="session")
def regression() -> type[Regression]:
    """The class of a small LightningModule; it takes a function from parameter groups to optimizers."""
    from tests.regression import Regression

    return Regression


@pytest.fixture(scope="session")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """Fit a module quietly on the CPU; keywords go to the trainer."""
    from lightning.pytorch import Trainer

    def run(
        module: LightningModule, *, ckpt_path: str | None = None, train_dataloaders: Any = None, **options: Any
    ) -> Trainer:
        quiet = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path_factory.mktemp("run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "max_epochs": 1,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
        }
        trainer = Trainer(**{**quiet, **options})
        trainer.fit(module, train_dataloaders, ckpt_path=ckpt_path)
        return trainer

    return run
