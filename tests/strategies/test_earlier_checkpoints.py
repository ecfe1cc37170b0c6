"""Checkpoints that version 0.1.0 saved resume as they did then: the weights some steps later are the same."""

import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.strategies import consolidate_checkpoint
from tests.processes import launch

DATA = Path(__file__).parents[1] / "data" / "checkpoints_0_1_0"


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    """The training that saved the checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DATA))
        import training_0_1_0  # type: ignore[import-not-found]

        yield training_0_1_0
        del sys.modules["training_0_1_0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The sharded checkpoint that fsdp2 wrote on two processes."""
    with tarfile.open(DATA / "sharded.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "sharded"


def difference(weights: dict[str, Tensor], place: str) -> float:
    """The largest relative difference of a parameter to what version 0.1.0 arrived at."""
    expected = torch.load(DATA / f"{place}_weights.pt", weights_only=True)
    assert weights.keys() == expected.keys()
    return max(float((weights[name] - value).norm() / value.norm()) for name, value in expected.items())


def test_a_file_resumes_on_one_device(training: ModuleType) -> None:
    weights = training.train(training.STEPS, resume=DATA / "one_device.pt")
    assert difference(weights, "one_device") <= 1e-6


def test_a_folder_resumes_on_one_device_once_it_is_consolidated(
    training: ModuleType, folder: Path, tmp_path: Path
) -> None:
    consolidate_checkpoint(folder, tmp_path / "one.pt")
    weights = training.train(training.STEPS, resume=tmp_path / "one.pt")
    assert difference(weights, "sharded") <= 1e-6


def test_both_resume_under_fsdp2(folder: Path) -> None:
    places = {"sharded": folder, "one_device": DATA / "one_device.pt"}
    program = DATA / "training_0_1_0.py"
    weights, _ = launch(program, "train_on_two_processes", 2, places, process_group=False)
    for place in places:
        assert difference(weights[place], place) <= 1e-6


def forget_momentum(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state.pop("momentum_buffer", None)


def forget_neurons(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state.pop("neuron_mean_square", None)


def forget_moments(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        if "exp_avg" in state:
            state.clear()


def forget_schedule(checkpoint: dict[str, Any]) -> None:
    checkpoint["lr_schedulers"][0]["last_epoch"] = 0


def forget_decay(checkpoint: dict[str, Any]) -> None:
    checkpoint["callbacks"].clear()


@pytest.mark.parametrize("forget", [forget_momentum, forget_neurons, forget_moments, forget_schedule, forget_decay])
def test_each_part_of_the_checkpoint_is_needed(
    forget: Callable[[dict[str, Any]], None], training: ModuleType, tmp_path: Path
) -> None:
    """Otherwise the tests above could not show that it was restored."""
    checkpoint = torch.load(DATA / "one_device.pt", weights_only=True)
    forget(checkpoint)
    torch.save(checkpoint, tmp_path / "incomplete.pt")
    weights = training.train(training.STEPS, resume=tmp_path / "incomplete.pt")
    assert difference(weights, "one_device") > 1e-4
