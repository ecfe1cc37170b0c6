"""Writing a sharded checkpoint: all ranks into a sibling folder, which gets the final name when it is complete."""

import io
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import override

from lightning_muon.strategies.atomic import (
    SaveError,
    SummedFile,
    clear_leftovers,
    is_written_by_another,
    locked,
    put_in_place,
    remove_all,
    restore,
    save_error,
    saving_path,
    sync_folder,
    synced,
)
from lightning_muon.strategies.integrity import CHECKSUMS, META, checksums_text
from lightning_muon.strategies.metadata import METADATA

Result = TypeVar("Result")

_RUN = uuid4().hex[:12]


def write_folder(
    path: Path, tensors: Mapping[str, Any], rest: Mapping[str, Any], group: dist.ProcessGroup | None = None
) -> None:
    """Write a sharded checkpoint under its final name when it is complete. A collective.

    Every rank writes its shards to a sibling folder and syncs them. Rank 0 adds the rest and the checksums, renames the
    folder, and then removes an earlier checkpoint of this name.

    Args:
        path: The folder. An earlier checkpoint, file or folder, is replaced.
        tensors: The tensors, sharded or equal on all ranks, in nested dicts.
        rest: What else there is, for ``meta.pt``.
        group: All ranks, with a backend for CPU tensors if it is not the default group.

    Raises:
        SaveError: On all ranks, if the file system of one of them refuses. The earlier checkpoint is unchanged, and
            what was written is removed.
        IsADirectoryError: If there is a folder that is no checkpoint.
    """
    saving = saving_path(path)
    with ExitStack() as until_done:
        facts = _on_rank_0(partial(_prepare, path, rest.get("global_step"), until_done), group)
        try:
            sums = _write_shards(saving, tensors, facts["save_id"], group)
            _on_rank_0(partial(_finish, path, {**rest, "save_id": facts["save_id"]}, facts, sums), group)
        except OSError as error:
            if dist.get_rank() == 0:
                remove_all(saving)
            raise save_error(path, error) from error


def check_replaceable(path: Path) -> None:
    """Refuse to replace a folder that is no checkpoint.

    Raises:
        IsADirectoryError: If it is none and not empty.
    """
    files = [file.name for file in path.iterdir()] if path.is_dir() else []
    if files and not any(name in {META, METADATA} or name.endswith(".distcp") for name in files):
        raise IsADirectoryError(f"'{path}' is a folder, but no checkpoint: it is not overwritten")


def _prepare(path: Path, step: int | None, until_done: ExitStack) -> dict[str, Any]:
    """Make an empty folder, locked while this process writes it, and return what the save is called."""
    saving = saving_path(path)
    check_replaceable(path)
    if is_written_by_another(saving):
        raise SaveError(f"'{path}' is being saved by another process: give the two runs folders of their own")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        restore(path)
        clear_leftovers(path.parent)
        remove_all(saving)
        saving.mkdir()
        until_done.enter_context(locked(saving))
    except OSError as error:
        raise save_error(path, error) from error
    return {"run": _RUN, "step": step, "save_id": f"{_RUN}-{step}-{uuid4().hex[:8]}"}


class _SummingFileSystem(FileSystem):
    """Files that are synced when they are closed; ``sums`` has size and CRC-32 of each by its name."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[int, int]] = {}

    @contextmanager
    @override
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        raw = SummedFile(path)
        with synced(raw) as stream:
            yield stream
        self.sums[Path(path).name] = (raw.size, raw.crc32)

    @override
    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Writer(FileSystemWriter):
    """Torch's writer, with checksums, and an id of the save that all files of it share."""

    def __init__(self, folder: Path, identity: str) -> None:
        super().__init__(folder, sync_files=False)  # the file system syncs them, after the last byte
        self.fs = self.files = _SummingFileSystem()
        self._identity = identity

    @override
    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self._identity)


def _write_shards(
    saving: Path, tensors: Mapping[str, Any], identity: str, group: dist.ProcessGroup | None
) -> dict[str, tuple[int, int]]:
    """Write the tensors, and return the checksums of all files."""
    writer = _Writer(saving, identity)
    # A tensor that is not sharded, such as the statistics of a batch norm, is saved from rank 0, as under DDP.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        raise first_failure(error) from None
    failure = None
    try:
        sync_folder(saving)
    except OSError as error:
        failure = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (writer.files.sums, failure), group=group)
    for _, found in outcomes:
        if found is not None:
            raise found
    return {name: entry for sums, _ in outcomes for name, entry in sums.items()}


def _finish(path: Path, rest: Mapping[str, Any], facts: Mapping[str, Any], sums: dict[str, tuple[int, int]]) -> None:
    saving = saving_path(path)
    raw = SummedFile(saving / META)
    with synced(raw) as stream:
        torch.save(dict(rest), stream)
    sums[META] = (raw.size, raw.crc32)
    with synced(SummedFile(saving / CHECKSUMS)) as stream:
        stream.write(checksums_text(sums, facts).encode())
    sync_folder(saving)
    put_in_place(saving, path)


def first_failure(error: CheckpointException) -> BaseException:
    """Return what the ranks failed with, an error of the file system if one of them had it."""
    failures = [failure for failure, _ in error.failures.values()]
    return next((failure for failure in failures if isinstance(failure, OSError)), failures[0] if failures else error)


def _on_rank_0(work: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """Call a function on rank 0, and return its result, or raise its error, on all ranks."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return cast("Result", outcome[0])
