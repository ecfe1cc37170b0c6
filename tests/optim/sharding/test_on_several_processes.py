"""Several processes do what one device does: the checks themselves are in the files that are named here."""

from pathlib import Path

import pytest

from tests.processes import REPOSITORY, launch

FOLDER = Path(__file__).parent


def run_checks(file: str, world_size: int) -> None:
    """Run all checks of a file in this folder on so many processes."""
    launch(FOLDER / file, "check_*", world_size, path=[REPOSITORY])


# Three processes have uneven and empty shards; the others take another half a minute.
@pytest.mark.parametrize("world_size", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 4))])
def test_twenty_steps_equal_one_device(world_size: int) -> None:
    run_checks("training_checks.py", world_size)


def test_options_equal_one_device() -> None:
    run_checks("option_checks.py", 3)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_travels(world_size: int) -> None:
    run_checks("traffic_checks.py", world_size)


# The checkpoints of tests/strategies hold the same, by Lightning's way.
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_state_is_saved_and_loaded(world_size: int) -> None:
    run_checks("state_checks.py", world_size)


def test_tensor_parallel_shards() -> None:
    run_checks("tensor_parallel_checks.py", 4)


def test_lightnings_strategies() -> None:
    run_checks("lightning_checks.py", 2)
