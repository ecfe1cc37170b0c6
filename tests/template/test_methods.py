"""Every method of `orthogonalize` trains a generated project for fifty steps, and resumes exactly from the middle."""

from pathlib import Path
from typing import get_args

import pytest

from lightning_muon.optim.polar.orthogonalize import OrthogonalizerName
from tests.processes import launch

PROGRAM = Path(__file__).with_name("method_training.py")
STEPS, HALF = 50, 25


# tests/optim holds the methods one by one; here they train a whole project, and resume.
@pytest.mark.slow
def test_every_method_trains_and_resumes(baked_project: Path, tmp_path: Path) -> None:
    methods = get_args(OrthogonalizerName)
    source = baked_project / "src"
    (found,) = launch(PROGRAM, "train_and_resume", 1, methods, STEPS, HALF, folder=tmp_path, path=[source])
    assert set(found) == set(methods)
    for method, (losses, resumes_exactly) in found.items():
        assert len(losses) == STEPS
        assert sum(losses[-5:]) / 5 < 0.75 * losses[0], method
        assert resumes_exactly, f"{method} does not resume exactly"
