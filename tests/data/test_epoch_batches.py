"""Each sample is used once in an epoch, by any number of ranks, also if it changes."""

import random
from itertools import chain

import pytest

from lightning_muon.data import EpochBatches, Position


def ranks(length: int, batch_size: int, world_size: int, **options: int) -> list[EpochBatches]:
    return [EpochBatches(length, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_union_of_the_ranks_is_the_epoch(world_size: int, batch_size: int) -> None:
    for length in range(world_size, 45):
        all_of = [list(one) for one in ranks(length, batch_size, world_size)]
        assert {len(batches) for batches in all_of} == {len(EpochBatches(length, batch_size, world_size=world_size))}
        assert sorted(chain.from_iterable(chain.from_iterable(all_of))) == list(range(length))
        for step in zip(*all_of, strict=True):
            sizes = {len(batch) for batch in step}
            assert max(sizes) - min(sizes) <= 1
            assert 1 <= min(sizes) <= max(sizes) <= batch_size + 1


def test_more_ranks_of_smaller_batches_take_the_same_steps() -> None:
    (one,) = ranks(40, 4, 1)
    two = ranks(40, 2, 2)
    together = [sorted(first + second) for first, second in zip(*two, strict=True)]
    assert together == [sorted(batch) for batch in one]


def test_the_number_of_ranks_may_change_at_any_step() -> None:
    draw = random.Random(0)  # noqa: S311 - for a test
    for _ in range(300):
        length, position, used = draw.randrange(4, 60), Position(epoch=2), []
        while position.samples < length:
            world_size, batch_size = draw.randrange(1, 5), draw.randrange(1, 5)
            group = ranks(length, batch_size, world_size, seed=7)
            for one in group:
                one.position = position
            left = length - position.samples
            steps = [list(one) for one in group]
            assert {len(batches) for batches in steps} == {len(group[0])}
            # A few steps, then other ranks go on.
            count = draw.randrange(1, len(steps[0]) + 1)
            for batches in zip(*steps, strict=True):
                if count == 0:
                    break
                count -= 1
                # Of fewer samples than ranks, each rank gets all.
                used += batches[0] if left < world_size else list(chain.from_iterable(batches))
                left = length - len(used)
                position = group[0].after(position)
        assert sorted(used) == list(range(length))


def test_each_epoch_has_an_order_of_its_own() -> None:
    batches = EpochBatches(100, 10, seed=3)
    first = list(batches)
    assert list(batches) == first
    batches.position = Position(epoch=1)
    assert sorted(chain.from_iterable(batches)) == sorted(chain.from_iterable(first))
    assert list(batches) != first
    assert list(EpochBatches(100, 10, seed=4)) != first
    assert list(chain.from_iterable(EpochBatches(100, 10, shuffle=False))) == list(range(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"world_size": 11}, "10 samples are too few for 11 ranks"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochBatches(**{"length": 10, "batch_size": 2, **options})
