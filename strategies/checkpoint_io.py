"""Checkpoints of one file: saved whole or not at all, checked when they are loaded, and if wanted in the background."""

import io
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from typing_extensions import override

from lightning_muon.strategies.atomic import clear_leftovers, put_aside, remove_all, write_file
from lightning_muon.strategies.checkpoint_folder import find_whole
from lightning_muon.strategies.folder_writer import check_replaceable
from lightning_muon.strategies.metadata import not_plain


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save a checkpoint under its final name only when it is complete and on the disk, and check it when it is loaded.

    ``Trainer(plugins=[AtomicCheckpointIO()])``; :class:`~lightning_muon.cli.MuonCLI` and ``FSDP2Strategy`` use it
    without being told. Lightning's own way writes to the temporary directory and moves the file: between two file
    systems that is a copy over the checkpoint before it, which a kill leaves torn.

    A kill, a full disk or a read-only one leaves the checkpoint before it unchanged. Loading compares the checksums
    that torch stores and does not check. It runs no code from the file: ``weights_only`` is ``True`` unless it is given
    as ``False``. Paths with a protocol, such as ``s3://``, are written and read as Lightning does.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: The file. Its folder is created; an earlier checkpoint, file or folder, is replaced.
            storage_options: Not supported.

        Raises:
            SaveError: If the file system refuses; the earlier checkpoint is unchanged.
            IsADirectoryError: If there is a folder that is no checkpoint.
            TypeError: If ``storage_options`` is given.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        check_replaceable(path)
        clear_leftovers(path.parent)
        write_file(path, partial(torch.save, checkpoint))

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint, after a check of its bytes.

        Args:
            path: The file.
            map_location: As for ``torch.load``.
            weights_only: Whether to refuse what is more than plain values. ``None`` refuses it.

        Raises:
            FileNotFoundError: If there is nothing at the path.
            DamagedCheckpointError: If bytes have changed or are missing.
            UnsafeCheckpointError: If there is more than plain values.
        """
        if _is_local(path):
            find_whole(Path(path))
        try:
            checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only is not False)
        except UnpicklingError as error:
            raise not_plain(Path(path), error) from None
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint. A folder loses its name first, so that a kill leaves no part of it under this name."""
        if _is_local(path):
            remove_all(put_aside(Path(path)))
        else:
            super().remove_checkpoint(path)


class AsyncAtomicCheckpointIO(AsyncCheckpointIO):
    """Save checkpoints in a thread: training waits for a copy to CPU memory only.

    ``Trainer(plugins=[AsyncAtomicCheckpointIO()])``. Under ``FSDP2Strategy`` sharded checkpoints are saved in the
    background too. Beside what :class:`~lightning.pytorch.plugins.io.AsyncCheckpointIO` does:

    - The copy is in CPU memory, and only one: a save waits for the one before it.
    - A checkpoint that ``ModelCheckpoint`` replaces is removed after the saves before, and only if they succeeded.
    - An error of a save is raised once, by the next save or at the end of training.

    Args:
        checkpoint_io: What saves and loads; by default :class:`AtomicCheckpointIO`.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io or AtomicCheckpointIO())
        self._pending: list[Future[None]] = []

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy a checkpoint, and save the copy in the background."""
        self.join()
        self.start(partial(super(AsyncCheckpointIO, self).save_checkpoint, snapshot(checkpoint), path, storage_options))

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, after the last save has ended."""
        self.join()
        return super().load_checkpoint(*args, **kwargs)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint when the saves before have succeeded."""
        before = list(self._pending)

        def remove() -> None:
            if all(save.exception() is None for save in before):
                super(AsyncAtomicCheckpointIO, self).remove_checkpoint(path)

        self.start(remove)

    def start(self, work: Callable[[], None]) -> None:
        """Call a function in the background, after all that were started before."""
        self._ensure_setup()
        assert self._executor is not None  # noqa: S101 - for the type checker
        self._pending.append(self._executor.submit(work))

    def join(self) -> None:
        """Wait for what was started, and raise the first error."""
        pending, self._pending = self._pending, []
        errors = [error for error in (work.exception() for work in pending) if error is not None]
        if errors:
            raise errors[0]

    @override
    def teardown(self) -> None:
        """Wait for the last save, and raise its error."""
        try:
            self.join()
        finally:
            super().teardown()


def use_atomic_checkpoints(strategy: Strategy) -> None:
    """Let a strategy save and load by the classes above, where it would by Lightning's."""
    plugin = strategy.checkpoint_io
    if type(plugin) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif type(plugin) is AsyncCheckpointIO and type(plugin.checkpoint_io) in {TorchCheckpointIO, AtomicCheckpointIO}:
        strategy.checkpoint_io = AsyncAtomicCheckpointIO()


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a checkpoint as it is now, with all tensors in CPU memory.

    What can be saved can be copied: it goes through pickle, except for the tensors. Two views of the same elements,
    such as tied weights, are one tensor in the copy.
    """
    copies: dict[Any, Tensor] = {}

    class Pickler(pickle.Pickler):
        @override
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, Tensor):
                return None
            key = _elements(obj)
            if key not in copies:
                copies[key] = obj.detach().to("cpu", copy=True)
            return key

    class Unpickler(pickle.Unpickler):
        @override
        def persistent_load(self, pid: Any) -> Any:
            return copies[pid]

    stream = io.BytesIO()
    Pickler(stream).dump(checkpoint)
    stream.seek(0)
    copy: dict[str, Any] = Unpickler(stream).load()
    return copy


def _elements(tensor: Tensor) -> Any:
    """Return a key that is the same for two tensors with the same elements in memory."""
    if type(tensor) not in {Tensor, torch.nn.Parameter} or tensor.layout != torch.strided or tensor.numel() == 0:
        return id(tensor)
    return (
        str(tensor.device),
        tensor.data_ptr(),
        str(tensor.dtype),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _is_local(path: str | Path) -> bool:
    return _is_local_file_protocol(path) and "://" not in str(path)
