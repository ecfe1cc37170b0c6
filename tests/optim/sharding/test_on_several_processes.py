"""What one device does, several processes do too: the checks themselves are in the files that are named here."""

from collections.abc import Callable

import pytest

Launch = Callable[[str, int], None]

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_twenty_steps_equal_one_device(launch: Launch, world_size: int) -> None:
    launch("training_checks.py", world_size)


def test_options_equal_one_device(launch: Launch) -> None:
    launch("option_checks.py", 3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_travels(launch: Launch, world_size: int) -> None:
    launch("traffic_checks.py", world_size)


@pytest.mark.parametrize("world_size", [1, 3])
def test_state_is_saved_and_loaded(launch: Launch, world_size: int) -> None:
    launch("state_checks.py", world_size)


def test_tensor_parallel_shards(launch: Launch) -> None:
    launch("tensor_parallel_checks.py", 4)


def test_lightnings_strategies(launch: Launch) -> None:
    launch("lightning_checks.py", 2)
