"""A step has the same number of samples, whatever the batch size and the number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_muon.callbacks import TargetBatch
from tests.callbacks import accumulated_training
from tests.processes import launch

pytestmark = pytest.mark.timeout(90)

Fit = Callable[..., Trainer]


def test_two_ranks_accumulate_half_of_what_one_does() -> None:
    """Eight samples a step: the steps, their estimate for schedules, and the weights are the same."""
    one = accumulated_training.run(1, 8)
    program = Path(accumulated_training.__file__)
    two = launch(program, "run", 2, 2, 8, process_group=False)
    assert (one["accumulate"], one["steps"], one["estimated"]) == (4, 8, 8)
    for result in two:
        assert (result["accumulate"], result["steps"], result["estimated"]) == (2, 8, 8)
        torch.testing.assert_close(result["weights"], one["weights"])
        assert result["speed"] > 0


@pytest.mark.parametrize(
    ("options", "attributes", "message"),
    [
        (
            {"samples": 9},
            {},
            "9 samples are no multiple of a batch, 2 samples × 1 rank = 2: give samples 8 or 10, or",
        ),
        (
            {"samples": 1},
            {},
            "1 samples are no multiple of a batch, 2 samples × 1 rank = 2: give samples 2, or",
        ),
        (
            {"tokens": 100},
            {"tokens_per_sample": 16},
            "100 tokens are no multiple of a batch, 2 samples × 1 rank × 16 tokens = 32: give tokens 96 or 128$",
        ),
        ({"tokens": 64}, {}, "tokens_per_sample is not known: give Samples an attribute tokens_per_sample"),
        ({"samples": 8}, {"batch_size": None}, "batch_size is not known: give Samples an attribute batch_size"),
    ],
)
def test_what_does_not_fit(options: dict[str, int], attributes: dict[str, Any], message: str, fit: Fit) -> None:
    module = accumulated_training.Samples()
    for name, value in attributes.items():
        setattr(module, name, value)
    with pytest.raises(MisconfigurationException, match=f"TargetBatch: {message}"):
        fit(module, callbacks=[TargetBatch(**options)])


def test_tokens_and_a_second_fit(fit: Fit) -> None:
    module: Any = accumulated_training.Samples()
    module.tokens_per_sample = 16
    callback = TargetBatch(tokens=128)
    assert fit(module, callbacks=[callback]).accumulate_grad_batches == 4
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches, which is 3 already"):
        fit(module, callbacks=[callback], accumulate_grad_batches=3)


@pytest.mark.parametrize("options", [{}, {"samples": 8, "tokens": 8}, {"samples": 0}])
def test_wrong_arguments(options: dict[str, int]) -> None:
    with pytest.raises(MisconfigurationException, match="TargetBatch: "):
        TargetBatch(**options)
