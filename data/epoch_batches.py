"""The order of samples: each once an epoch over all ranks, from any position, in batches of one size."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Position(NamedTuple):
    """Where a run is in its data; the same on all ranks.

    Args:
        epoch: The number of the epoch.
        samples: Samples of this epoch that all ranks together have used.
    """

    epoch: int = 0
    samples: int = 0


class EpochBatches:
    """The batches of indices of one rank, from a position to the end of its epoch.

    In each step all ranks together take the next ``batch_size`` × ``world_size`` samples of a permutation that depends
    on the seed and the epoch only. So each sample is used once in an epoch, by whatever number of ranks, and also if
    that number changes in mid-epoch. All ranks have the same number of batches: the samples of the last step are dealt
    out evenly, and if it would have fewer samples than ranks, they are added to the step before, whose batches have one
    sample more then. Only where fewer samples than ranks are left after a change of their number, each rank gets all of
    these samples, which gives the same average gradient.

    It serves as the ``batch_sampler`` of torch's ``DataLoader``.

    Args:
        length: Number of samples in an epoch.
        batch_size: Samples per batch and rank.
        shuffle: Whether each epoch has an order of its own; without, it is that of the dataset.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of ranks.

    Raises:
        ValueError: If there are fewer samples than ranks, or an argument is out of range.
    """

    def __init__(
        self, length: int, batch_size: int, *, shuffle: bool = True, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        if length < world_size:
            raise ValueError(f"{length} samples are too few for {world_size} ranks: each needs one")
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = Position()

    def __len__(self) -> int:
        """Return the number of batches from the position to the end of the epoch; the same on all ranks."""
        left = self.length - self.position.samples
        if left < self.world_size:
            return int(left > 0)
        return (left - self.world_size) // (self.batch_size * self.world_size) + 1

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch from the position on; the position stays where it is."""
        order = self._order(self.position.epoch)
        position = self.position
        while position.samples < self.length:
            following = self.after(position)
            samples = order[position.samples : following.samples]
            mine = samples if len(samples) < self.world_size else samples[self.rank :: self.world_size]
            yield mine.tolist()
            position = following

    def after(self, position: Position) -> Position:
        """Return the position after one more batch."""
        left = self.length - position.samples
        together = self.batch_size * self.world_size
        taken = left if left < together + self.world_size else together
        return Position(position.epoch, position.samples + taken)

    def _order(self, epoch: int) -> np.ndarray:
        """Return the indices of an epoch in their order, shape (length,)."""
        order = np.arange(self.length, dtype=np.int32 if self.length < 2**31 else np.int64)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        return order
