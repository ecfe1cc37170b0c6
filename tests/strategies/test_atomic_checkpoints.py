"""A save leaves the checkpoint or the one before it, whatever happens; damage and code do not load."""

import errno
import io
import os
import pickle
import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_muon.strategies import (
    AsyncAtomicCheckpointIO,
    AtomicCheckpointIO,
    DamagedCheckpointError,
    SaveError,
    UnsafeCheckpointError,
    atomic,
    check_whole,
)
from lightning_muon.strategies.checkpoint_io import snapshot
from tests.strategies.failing_disk import FailingDisk


def checkpoint(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"w": torch.full((50, 7), float(step))}, "hyper_parameters": {"lr": 0.1}}


def step_of(path: Path) -> int:
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], checkpoint(loaded["global_step"])["state_dict"]["w"])
    return int(loaded["global_step"])


def damage(path: Path) -> str | None:
    try:
        check_whole(path)
    except DamagedCheckpointError as error:
        return str(error)
    return None


def failing_disk(monkeypatch: pytest.MonkeyPatch, code: int) -> FailingDisk:
    """Count opening and writing a file too."""
    disk = FailingDisk(monkeypatch, code)

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            disk.count()
            return super().write(data)

    opened = SimpleNamespace(FileIO=disk.counted(File), BufferedWriter=io.BufferedWriter)
    monkeypatch.setattr(atomic, "io", opened)
    return disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_write_may_fail(asynchronous: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, disk = tmp_path / "last.ckpt", failing_disk(monkeypatch, code)
    many = {"more": [torch.zeros(3000) for _ in range(6)]}  # larger than a buffer
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    failures = 0
    for operation in range(1, 100):
        plugin = AsyncAtomicCheckpointIO() if asynchronous else AtomicCheckpointIO()
        error = None
        with disk.failing(operation):
            try:
                plugin.save_checkpoint(checkpoint(2) | many, path)
                plugin.teardown()
            except SaveError as raised:
                error = raised
        if not disk.failed:
            break
        assert list(tmp_path.iterdir()) == [path]
        if error is not None:
            failures += 1
            assert str(error).startswith(f"'{path}' could not be saved: {os.strerror(code)}; the checkpoint under")
            assert "\n" not in str(error)
            assert step_of(path) in {1, 2}  # 2: only syncing the name has failed
    assert failures >= 10
    assert error is None
    assert step_of(path) == 2


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Also where the stream fails inside torch, which raises an error of its own."""
    import resource
    import signal

    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in range(0, path.stat().st_size, 97):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(SaveError, match=r"last.ckpt' could not be saved: File too large"):
                AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [path]
    assert step_of(path) == 1


@pytest.mark.parametrize("all_bits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_changed_bytes_are_found(all_bits: bool, tmp_path: Path) -> None:
    """In each byte: a flipped bit is refused, or it is in bytes that mean nothing: between the records, or a date."""
    path, other = tmp_path / "last.ckpt", tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), other)
    AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    good = path.read_bytes()
    draw = random.Random(0)  # noqa: S311
    start = good.index(torch.tensor([2.0] * 9).numpy().tobytes())
    refused = 0
    for place in range(len(good)):
        for bit in range(8) if all_bits else [draw.randrange(8)]:
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            message = damage(path)
            if message is None:
                assert step_of(path) == 2
                assert not start <= place < start + 1400
            else:
                refused += 1
                assert message.startswith(f"the checkpoint '{path}' is damaged: its ")
                assert message.endswith(f"; use '{other}', the newest whole one beside it")
                assert "\n" not in message
    assert refused >= 1400


def test_torn_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    good = path.read_bytes()
    for size in range(0, len(good), 53):
        path.write_bytes(good[:size])
        with pytest.raises(
            (DamagedCheckpointError, ValueError),
            match=r"is damaged: it.*there is no whole one beside|is not a checkpoint",
        ):
            step_of(path)


def test_files_without_checksums_load(tmp_path: Path) -> None:
    """Those that torch saves without, and those of the format before zip."""
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(checkpoint(3), tmp_path / "without.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(checkpoint(4), tmp_path / "before.ckpt", _use_new_zipfile_serialization=False)
    assert step_of(tmp_path / "without.ckpt") == 3
    assert step_of(tmp_path / "before.ckpt") == 4


def test_what_a_kill_leaves_is_removed_by_the_next_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch")
    left = tmp_path / ".last.ckpt.0123abcd.saving"
    left.write_bytes(b"half")
    mine = tmp_path / ".notes.saving.txt"
    mine.touch()
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert sorted(tmp_path.iterdir()) == [mine, tmp_path / "last.ckpt"]
    assert caplog.messages == [f"removed '{left}': the process that saved it was killed"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    def write(stream: Any) -> None:
        stream.write(b"first half")
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "other.ckpt")
        stream.write(b", second half")

    atomic.write_file(tmp_path / "last.ckpt", write)
    assert (tmp_path / "last.ckpt").read_bytes() == b"first half, second half"


def test_a_folder_is_replaced_only_if_it_is_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    (path / "precious").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"last.ckpt' is a folder, but no checkpoint: it is not overwritten"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    shutil.rmtree(path)
    path.mkdir()
    (path / "meta.pt").touch()
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    assert step_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]


class Payload:
    """Runs a command when it is unpickled by plain pickle."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.witness}'",)


def test_no_code_runs_from_a_file(tmp_path: Path) -> None:
    path, witness = tmp_path / "last.ckpt", tmp_path / "witness"
    AtomicCheckpointIO().save_checkpoint({**checkpoint(1), "more": Payload(witness)}, path)
    with pytest.raises(
        UnsafeCheckpointError, match=r"last.ckpt' is not loaded: it contains posix.system, .*could run"
    ) as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps(Payload(witness)))
    with pytest.raises(ValueError, match=r"last.ckpt' is not a checkpoint of torch, or a damaged one"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not witness.exists()


def test_other_file_systems_are_left_to_lightning() -> None:
    path = "memory://runs/last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint(checkpoint(1), path)
    assert plugin.load_checkpoint(path)["global_step"] == 1
    plugin.remove_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        plugin.load_checkpoint(path)


class Slow(AtomicCheckpointIO):
    """Saves when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.error: SaveError | None = None

    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        assert self.go.wait(20)
        if self.error:
            raise self.error
        super().save_checkpoint(*arguments, **options)


def test_in_the_background_the_state_of_the_call_is_saved(tmp_path: Path) -> None:
    slow = Slow()
    plugin = AsyncAtomicCheckpointIO(slow)
    assert isinstance(plugin, AsyncCheckpointIO)
    state = checkpoint(1)
    plugin.save_checkpoint(state, tmp_path / "last.ckpt")
    state["state_dict"]["w"].fill_(5)
    state["hyper_parameters"]["lr"] = 7
    assert not (tmp_path / "last.ckpt").exists()
    slow.go.set()
    loaded = plugin.load_checkpoint(tmp_path / "last.ckpt")  # waits for it
    assert loaded["hyper_parameters"] == {"lr": 0.1}
    assert step_of(tmp_path / "last.ckpt") == 1
    plugin.teardown()


def test_in_the_background_a_checkpoint_is_removed_when_the_next_one_is_there(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), old)
    slow = Slow()
    plugin = AsyncAtomicCheckpointIO(slow)
    plugin.save_checkpoint(checkpoint(2), new)
    plugin.remove_checkpoint(old)
    assert old.exists()
    slow.go.set()
    plugin.teardown()
    assert list(tmp_path.iterdir()) == [new]
    # Nor if that one fails; its error comes out once.
    slow.error = SaveError("the disk is full")
    plugin.save_checkpoint(checkpoint(3), old)
    plugin.remove_checkpoint(new)
    with pytest.raises(SaveError, match="the disk is full"):
        plugin.save_checkpoint(checkpoint(4), old)
    assert new.exists()
    plugin.teardown()


def test_a_snapshot_keeps_what_is_shared() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    copy = snapshot({"embedding": weight, "head": weight.detach(), "transposed": weight.mT, "none": None, "empty": []})
    assert copy["embedding"] is copy["head"]
    assert torch.equal(copy["transposed"], weight.mT)
    assert copy["embedding"].data_ptr() != weight.data_ptr()
