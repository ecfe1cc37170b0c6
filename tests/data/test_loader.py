"""Under Lightning an epoch is each sample once, on any number of ranks, and over a stop in its middle."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from lightning_muon.data import EpochDataModule, EpochLoader
from tests.data import epoch_training
from tests.processes import launch

PROGRAM = Path(__file__).with_name("epoch_training.py")
SAMPLES = 37


def run(world_size: int, *arguments: Any) -> list[dict[str, Any]]:
    return launch(PROGRAM, "run", world_size, *arguments, process_group=world_size > 1)


def samples(results: list[dict[str, Any]], epoch: int) -> list[int]:
    return sorted(chain.from_iterable(batch for one in results for of, batch in one["used"] if of == epoch))


@pytest.mark.parametrize(
    ("before", "after", "is_ended"),
    [
        (1, 2, False),
        (3, 2, True),
        pytest.param(2, 3, False, marks=pytest.mark.slow),  # other numbers
        pytest.param(3, 1, False, marks=pytest.mark.slow),
        pytest.param(2, 1, True, marks=pytest.mark.slow),
    ],
)
def test_the_number_of_ranks_may_change_in_mid_epoch(before: int, after: int, is_ended: bool, tmp_path: Path) -> None:
    """Also with other numbers of workers and another batch size, and whether or not a last step ended the run."""
    saved = str(tmp_path / "saved.ckpt")
    first = run(before, 4 if is_ended else 5, 2, 0, None, saved, is_ended)
    used = samples(first, 0)
    assert len(used) == 8 * before
    per_step = 3 * after
    steps = 4 + (SAMPLES - len(used) - after) // per_step + 1 + (SAMPLES - after) // per_step + 1
    second = run(after, steps, 3, 2, saved)
    assert sorted(used + samples(second, 0)) == list(range(SAMPLES))
    assert samples(second, 1) == list(range(SAMPLES))
    assert {epoch for one in second for epoch, _ in one["used"]} == {0, 1}
    # After each of the two epochs, all samples are evaluated once.
    evaluated = Counter(chain.from_iterable(chain.from_iterable(one["evaluated"] for one in second)))
    assert evaluated == dict.fromkeys(range(SAMPLES), 2)


@pytest.mark.parametrize(("steps", "before", "after"), [(4, 4, 3), (7, 3, 4), (10, 4, 3), (12, 4, 4)])
def test_a_run_that_ended_in_mid_epoch_goes_on_to_validate_at_the_ends_of_epochs(
    steps: int, before: int, after: int, tmp_path: Path
) -> None:
    """Other batch sizes give the rest of the epoch another number of batches than Lightning has counted before."""
    saved = str(tmp_path / "saved.ckpt")
    first = epoch_training.run(steps, before, 0, None, saved, is_ended=True)
    epoch = first["used"][-1][0]
    left = SAMPLES - len(samples([first], epoch))
    second = epoch_training.run(steps + -(-left // after) + -(-SAMPLES // after), after, 0, saved)
    assert sorted(samples([first], epoch) + samples([second], epoch)) == list(range(SAMPLES))
    assert samples([second], epoch + 1) == list(range(SAMPLES))
    # Where the first run has ended with its epoch, it has evaluated after it.
    assert Counter(chain.from_iterable(second["evaluated"])) == dict.fromkeys(range(SAMPLES), 2 if left else 1)


@pytest.mark.parametrize("is_ended", [False, True])
def test_a_stop_in_mid_epoch_changes_nothing(is_ended: bool, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved.ckpt")
    (straight,) = run(1, 17, 4)
    (first,) = run(1, 6 if is_ended else 7, 4, 0, None, saved, is_ended)
    (second,) = run(1, 17, 4, 1, saved)
    assert first["used"] + second["used"] == straight["used"]
    assert second["weight"] == straight["weight"]


def test_a_limit_of_batches_skips_no_samples() -> None:
    (limited,) = run(1, 20, 4, 0, None, None, False, 4)
    (straight,) = run(1, 20, 4)
    assert limited["used"] == straight["used"]


def test_for_evaluation_each_iteration_is_the_same() -> None:
    loader = EpochLoader(TensorDataset(torch.arange(10)), 4, train=False)
    next(iter(loader))  # as a limit of the trainer stops it
    for _ in range(2):
        assert [batch.tolist() for (batch,) in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_without_a_trainer_an_epoch_follows_another() -> None:
    loader = EpochLoader(TensorDataset(torch.arange(10)), 4)
    first, second = ([batch.tolist() for (batch,) in loader] for _ in range(2))
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second)) == list(range(10))
    assert first != second


def test_wrong_arguments_are_named() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 0

    with pytest.raises(TypeError, match="Stream has no length"):
        EpochLoader(Stream(), 2)
    for name, value in (("batch_size", 0), ("num_workers", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least {max(value + 1, 0)}, got {value}"):
            EpochDataModule(**{name: value})
