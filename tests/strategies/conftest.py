"""Trainings on several processes, and the comparison of their results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import launch

Train = Callable[..., list[dict[str, Any]]]

PROGRAM = Path(__file__).with_name("sharded_training.py")


@pytest.fixture(scope="session")
def train() -> Train:
    """`train(world_size, *jobs)`: what rank 0 returns of each job of sharded_training.py."""

    def run(world_size: int, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = launch(PROGRAM, "run_jobs", world_size, jobs)[0]
        return results

    return run


@pytest.fixture
def assert_equal() -> Callable[..., None]:
    """`assert_equal(result, expected, tolerance=1e-5)`: weights, optimizer state, its options and validation loss."""

    def check(result: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
        for part in ("weights", "state"):
            assert result[part].keys() == expected[part].keys()
            for name, value in expected[part].items():
                error = (result[part][name] - value).abs().max()
                assert error <= tolerance, f"{name} of the {part} is off by {error}"
        assert result["options"] == expected["options"]
        assert result["loss"] == pytest.approx(expected["loss"], abs=tolerance)

    return check
