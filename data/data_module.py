"""A data module whose loaders share the samples among the ranks, and resume exactly."""

from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_muon.data.loader import EpochLoader, Samples


class EpochDataModule(pl.LightningDataModule):
    """Give a data module loaders that use each sample once an epoch, and go on in mid-epoch from a checkpoint.

    A module of your own says what the datasets are::

        class Pictures(EpochDataModule):
            def train_dataloader(self):
                return self.train_loader(self.train_set)

            def val_dataloader(self):
                return self.eval_loader(self.val_set)

    The position in the epoch is in the checkpoint as the state of the data module, so that the number of ranks and the
    batch size may be other ones on resume.

    Args:
        batch_size: Samples per batch and device.
        num_workers: Processes that load samples, for each loader and device; 0: the training process does.
        seed: Seed of the order of samples.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._resumed: dict[str, int] = {}
        self._train: EpochLoader | None = None
        self._usual_reload: int | None = None

    def train_loader(self, dataset: Samples | Dataset[Any], **options: Any) -> EpochLoader:
        """Return the loader of a training set; a resumed run goes on in mid-epoch.

        An epoch of the trainer is one of the data, or the whole run if ``max_steps`` makes that shorter.

        Args:
            dataset: A dataset with ``__len__`` and ``__getitem__``.
            options: Passed to ``DataLoader``, such as ``collate_fn``.
        """
        max_batches = None
        if self.trainer and self.trainer.max_steps > 0:
            max_batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        # Lightning's overfit_batches wants the same batches again and again.
        overfits = bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        before, loader = self._train, self._loader(dataset, train=not overfits, max_batches=max_batches, **options)
        self._train = loader
        if self._resumed and (before is None or not before.has_begun):
            # Now, and not when Lightning restores the loader: before that, it has asked for the length.
            loader.load_state_dict({**self._resumed, "seen": self._seen_by_lightning()})
            # Lightning counts the batches of an epoch once, but the next epoch has another number.
            usual = self._reload_every(1)
            self._usual_reload = usual if self._usual_reload is None else self._usual_reload
        elif before is not None:  # Lightning loads the data anew
            self._resumed = {}
            loader.continue_from(before)
            if self._usual_reload is not None and loader.batches.position.samples == 0:
                self._reload_every(self._usual_reload)
                self._usual_reload = None
        return loader

    def _reload_every(self, epochs: int) -> int:
        """Let Lightning ask for loaders anew after so many epochs, 0 for never; return what it was before."""
        if self.trainer is None:
            return 0
        before: int = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        self.trainer.reload_dataloaders_every_n_epochs = epochs  # type: ignore[attr-defined]
        return before

    def _seen_by_lightning(self) -> int:
        """Return the number of batches that Lightning has counted in the epoch that a resumed run is in.

        A run that ``max_steps`` or a signal stopped has ended its epoch, though the loader has not. Lightning counts on
        in this epoch if the length of the run that goes on is given in steps; if in epochs, it begins at 0.
        """
        if self.trainer is None:
            return 0
        loop = self.trainer.fit_loop
        # The length may be asked for before Lightning has restored its loop.
        checkpoint = self.trainer._checkpoint_connector._loaded_checkpoint
        is_restored = "loops" not in checkpoint
        state: dict[str, Any] = loop.state_dict() if is_restored else checkpoint["loops"]["fit_loop"]
        epochs, batches = state["epoch_progress"]["current"], state["epoch_loop.batch_progress"]["current"]
        restarts = loop.restarting if is_restored else self.trainer.max_steps != -1
        # Saved in the last batch of an epoch, a run begins the next epoch.
        counts_on = restarts and batches["completed"] == batches["ready"]
        return batches["ready"] if epochs["ready"] > epochs["processed"] or counts_on else 0

    def eval_loader(self, dataset: Samples | Dataset[Any], **options: Any) -> EpochLoader:
        """Return the loader of a set for validation or test: all samples in their order, each time."""
        return self._loader(dataset, train=False, **options)

    def predict_loader(self, dataset: Samples | Dataset[Any], **options: Any) -> DataLoader[Any]:
        """Return the loader of what ``predict`` reads: each sample once, in its order on one device.

        Several ranks share the samples. But each of them has all where a rank would have none, and where the weights
        are sharded: then all ranks must take the same steps.

        Args:
            dataset: A dataset with ``__len__`` and ``__getitem__``.
            options: Passed to ``DataLoader``, such as ``collate_fn``.
        """
        usual: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        trainer, as_dataset = self.trainer, cast("Dataset[Any]", dataset)
        if trainer and trainer.world_size > 1:
            sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
            if sharded or len(as_dataset) < trainer.world_size:  # type: ignore[arg-type]
                # Lightning replaces any other sampler by one that shares the samples out.
                usual["sampler"] = DistributedSampler(as_dataset, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(as_dataset, **{**usual, **options})

    def _loader(self, dataset: Samples | Dataset[Any], **options: Any) -> EpochLoader:
        usual = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        return EpochLoader(
            dataset,
            self.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            **{**usual, **options},
        )

    @override
    def state_dict(self) -> dict[str, int]:
        return {} if self._train is None else self._train.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resumed = dict(state_dict)
