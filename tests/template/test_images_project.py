"""A generated project of the task *images*: on two processes, and with networks of libraries."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import REPOSITORY, launch

PROGRAM = Path(__file__).with_name("images_training.py")


@pytest.fixture(scope="module")
def images_project(project_of: Callable[[str], Path]) -> Path:
    return project_of("images")


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


# The loader is held by tests/data/test_loader.py; here it is in a whole project.
@pytest.mark.slow
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
