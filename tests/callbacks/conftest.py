"""What the tests of the callbacks share."""

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Events:
    """What a trainer's TensorBoard file says."""

    def __init__(self, trainer: Trainer) -> None:
        trainer.logger.experiment.flush()
        self._events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0})
        self._events.Reload()

    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        tags = self._events.Tags()["scalars"]
        return {tag: [(event.step, event.value) for event in self._events.Scalars(tag)] for tag in tags}

    def texts(self, tag: str) -> list[str]:
        name = f"{tag}/text_summary"
        if name not in self._events.Tags()["tensors"]:
            return []
        return [event.tensor_proto.string_val[0].decode() for event in self._events.Tensors(name)]


@pytest.fixture
def events() -> type[Events]:
    return Events


@pytest.fixture
def tensorboard(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path / "logs", default_hp_metric=False)
