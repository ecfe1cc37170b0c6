"""What tests of every room share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep small tensors on one thread: faster for them, and the same sums everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def baked_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project generated with the default answers; copy it before changing anything in it."""
    # A space in the path, because a user's may have one.
    folder = tmp_path_factory.mktemp("baked project")
    command = [sys.executable, "-m", "cookiecutter", str(REPOSITORY), "--no-input", "--default-config"]
    # cookiecutter writes answers and clones below the home folder: not below the user's.
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
    subprocess.run([*command, "--output-dir", str(folder)], env=environment, check=True, capture_output=True)
    return folder / "my-muon-project"
