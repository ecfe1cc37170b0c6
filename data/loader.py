"""A loader of torch that resumes exactly, and shares the samples of an epoch among the ranks."""

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_muon.data.epoch_batches import EpochBatches, Position


class Samples(Protocol):
    """A dataset of known length."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return a sample."""


@runtime_checkable
class RandomSamples(Protocol):
    """A dataset whose training samples differ from epoch to epoch, such as augmented images."""

    def draw(self, index: int, generator: np.random.Generator, /) -> Any:
        """Return a sample, with all that is random taken from the generator."""


class UnreadableSampleError(ValueError):
    """A sample that cannot be read; the message names its file. It is one line, also if a worker has raised it."""


class EpochLoader:
    """A ``DataLoader`` that uses each sample once an epoch over all ranks, and goes on where a checkpoint was saved.

    Its state is the position in the epoch, which is the same on all ranks and for any number of workers. So a run may
    resume in mid-epoch with other numbers of ranks and workers, and another batch size: the samples that are left are
    those that were not used. Its epochs are its own: where a limit of the trainer ends an epoch before all samples are
    used, the next one goes on with the rest.

    A dataset with ``draw(index, generator)`` makes its samples for training by it, such as augmented images
    (:class:`RandomSamples`). The generator is seeded by epoch and index, so that a resumed run, on any number of ranks
    and workers, draws what one without a break would. What workers draw otherwise is seeded by epoch and position, and
    a resumed run draws other values.

    Args:
        dataset: A dataset with ``__len__`` and ``__getitem__``.
        batch_size: Samples per batch and rank.
        train: Whether each epoch has an order of its own, and the position is kept. For evaluation, without: each
            iteration begins at the first sample, and keeps the dataset's order.
        seed: Seed of the order and of the workers.
        rank: Rank of this process.
        world_size: Number of ranks.
        max_batches: The largest number of batches of an iteration, such as those of the whole run: the trainer's
            fractions of an epoch, such as ``val_check_interval=0.25``, are then fractions of them.
        options: Passed to ``torch.utils.data.DataLoader``: ``num_workers``, ``pin_memory``, ``collate_fn`` …

    Attributes:
        seen: The number of batches of this iteration so far.
        has_begun: Whether it has yielded a batch.

    Raises:
        ValueError: If there are fewer samples than ranks, or an argument is out of range.
    """

    def __init__(
        self,
        dataset: Samples | Dataset[Any],
        batch_size: int,
        *,
        train: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_batches: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError(f"{type(dataset).__name__} has no length: EpochLoader needs to know where an epoch ends")
        self.train = train
        self.batches = EpochBatches(
            len(dataset), batch_size, shuffle=train, seed=seed, rank=rank, world_size=world_size
        )
        self.max_batches = max_batches
        self.seen = 0
        self.has_begun = False
        self._is_resumed = False
        self._generator = torch.Generator()
        draws = train and isinstance(dataset, RandomSamples)
        self.loader: DataLoader[Any] = DataLoader(
            _Drawn(dataset, seed) if draws else dataset,  # type: ignore[arg-type]
            batch_sampler=_WithEpochs(self.batches) if draws else self.batches,
            generator=self._generator,
            persistent_workers=options.get("num_workers", 0) > 0,
            **options,
        )

    def __len__(self) -> int:
        """Return the number of batches of an iteration; after a resume, those before it included."""
        batches = self.seen + len(self.batches)
        return batches if self.max_batches is None else min(batches, self.max_batches)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches that are left of the epoch; if none is, those of the next."""
        if not self.train:
            return _with_short_errors(self.loader)
        if not self._is_resumed:
            self.seen = 0
            self._leave_epoch_at_its_end()
        return self._iterate()

    def _iterate(self) -> Iterator[Any]:
        batches = self.batches
        self._is_resumed = False  # not before: Lightning makes an iterator to see whether it can
        self._generator.manual_seed(hash((batches.seed, *batches.position)))
        for batch in islice(_with_short_errors(self.loader), len(self) - self.seen):
            batches.position = batches.after(batches.position)
            self.seen += 1
            self.has_begun = True
            yield batch

    def continue_from(self, other: "EpochLoader") -> None:
        """Take the position of the loader before this one, or begin an epoch if that one was at the end of its own."""
        position, length = other.batches.position, self.batches.length
        is_over = position.samples == other.batches.length or length != other.batches.length
        self.batches.position = Position(position.epoch + 1) if is_over else position

    def state_dict(self) -> dict[str, int]:
        """Return the position, as Lightning saves it in checkpoints, and the number of batches of this iteration."""
        return {**self.batches.position._asdict(), "seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to a position."""
        self.batches.position = Position(state_dict["epoch"], state_dict["samples"])
        self.seen, self._is_resumed = state_dict["seen"], True
        if self.seen == 0:
            self._leave_epoch_at_its_end()

    def _leave_epoch_at_its_end(self) -> None:
        if self.batches.position.samples == self.batches.length:
            self.batches.position = Position(self.batches.position.epoch + 1)


class _WithEpochs:
    """Yield pairs of epoch and index, because workers do not know the epoch."""

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.batches.position.epoch
        for batch in self.batches:
            yield [(epoch, index) for index in batch]


class _Drawn:
    """Call ``draw`` with a new generator for each sample."""

    def __init__(self, dataset: RandomSamples, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, number: tuple[int, int]) -> Any:
        epoch, index = number
        return self.dataset.draw(index, np.random.default_rng([self.seed, epoch, index]))


def _with_short_errors(batches: DataLoader[Any]) -> Iterator[Any]:
    """Yield batches; torch adds the traceback of a worker to the message of its error."""
    try:
        yield from batches
    except UnreadableSampleError as error:
        raise UnreadableSampleError(str(error).rstrip().rpartition(f"{UnreadableSampleError.__name__}: ")[2]) from error
