"""A generated project of the task *images*: its style, two processes, and its own tests."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import launch, run_module

REPOSITORY = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("images_training.py")


@pytest.fixture(scope="module")
def images_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("images project")
    command = [sys.executable, "-m", "cookiecutter", str(REPOSITORY), "--no-input", "--default-config", "task=images"]
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
    subprocess.run([*command, "--output-dir", str(where)], env=environment, check=True, capture_output=True)
    return where / "my-muon-project"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `images` of three classes, 40 each, of which 12 are for validation."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate("abc"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(200, size=(8, 8, 3), dtype=np.uint8)
            pixels[:, :, channel] += 40
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path


def test_it_keeps_its_style(images_project: Path) -> None:
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        ruff = [sys.executable, "-m", "ruff", *command, "."]
        finished = subprocess.run(ruff, cwd=images_project, text=True, capture_output=True, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr


def test_two_processes_see_the_whole_validation(images_project: Path, folder: Path) -> None:
    """By ddp with TensorBoard, whose figures are of all images; then the same weights on one process."""
    found = launch(PROGRAM, "fit_and_validate", 2, folder=folder, path=[images_project / "src"], process_group=False)
    first, second = found
    assert first["metrics"] == second["metrics"]
    assert first["weights"] == second["weights"]
    assert first["drawn"] == [(12, first["mistakes"])] * 2
    assert second["drawn"] == []
    (alone,) = launch(PROGRAM, "validate", 1, folder=folder, path=[images_project / "src"], process_group=False)
    for name, value in alone["metrics"].items():
        assert value == pytest.approx(first["metrics"][name], rel=1e-5), name
    # No logger, or one that takes no figures.
    assert alone["drawn"] == []


@pytest.mark.slow  # 10 s to import the two libraries; test_networks.py guards the way to choose a network
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_network_of_a_library(images_project: Path, folder: Path, library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    path = [images_project / "src", REPOSITORY / "tests" / "corpus"]
    (found,) = launch(PROGRAM, f"fit_{library}", 1, folder=folder, path=path)
    assert found["outputs"] == 3
    assert set(found["classes"]) <= {"a", "b", "c"}


@pytest.mark.slow  # half a minute: all presets and strategies on another network than that of the task text
def test_its_own_tests_pass(images_project: Path, tmp_path: Path) -> None:
    project = shutil.copytree(images_project, tmp_path / "a project")
    finished = run_module("pytest", "-q", folder=project)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_its_own_tests_of_images_pass(images_project: Path, tmp_path: Path) -> None:
    project = shutil.copytree(images_project, tmp_path / "a project")
    finished = run_module("pytest", "-q", "tests/test_images.py", folder=project)
    assert finished.returncode == 0, finished.stdout + finished.stderr
