"""Sharded checkpoints, from one process: damage and code do not load, and what a kill leaves is put in order."""

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_muon.strategies import (
    DamagedCheckpointError,
    UnsafeCheckpointError,
    atomic,
    check_whole,
    clear_leftovers,
    consolidate_checkpoint,
    find_whole,
    integrity,
)


def damage(path: Path) -> str | None:
    try:
        check_whole(path)
    except DamagedCheckpointError as error:
        return str(error)
    return None


class Payload:
    """Runs a command when it is unpickled by plain pickle."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.witness}'",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint that Lightning's own strategies could have written: without checksums."""
    path = tmp_path / "runs" / "last.ckpt"
    tensors = {"state_dict": {"w": torch.full((4, 4), 1.0)}, "extra": 3}
    save(tensors, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 1}, path / "meta.pt")
    return path


def with_checksums(folder: Path) -> Path:
    sums = {file.name: (file.stat().st_size, integrity._crc32(file)) for file in folder.iterdir()}
    identity = integrity.save_id(integrity.read_metadata(folder))
    (folder / "checksums.json").write_text(integrity.checksums_text(sums, {"save_id": identity}))
    return folder


def test_folders_without_checksums_are_checked_for_their_files(folder: Path) -> None:
    check_whole(folder)
    shard = folder / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(
        DamagedCheckpointError, match=rf"last.ckpt' is damaged: __0_0.distcp has {len(content) - 1} bytes"
    ):
        check_whole(folder)
    shard.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"__0_0.distcp is missing"):
        check_whole(folder)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt", "checksums.json"])
def test_a_folder_with_changed_bytes_is_refused(name: str, folder: Path) -> None:
    file = with_checksums(folder) / name
    content = file.read_bytes()
    check_whole(folder)
    for place in range(0, len(content), 1 + len(content) // 40):
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        message = damage(folder)
        if message is None:
            assert name == "checksums.json"  # a blank, or the name of the run
        else:
            assert message.startswith(f"the checkpoint '{folder}' is damaged: ")
            assert "\n" not in message
    file.unlink()
    if name == "checksums.json":
        check_whole(folder)  # as one of Lightning's
    else:
        with pytest.raises(DamagedCheckpointError, match=f"{name} is missing"):
            check_whole(folder)


def test_changed_metadata_is_refused_without_checksums_too(folder: Path) -> None:
    """Or it means the same, or something else that is harmless: no error but ours, and no other function is called."""
    file = folder / ".metadata"
    content = file.read_bytes()
    refused = 0
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            check_whole(folder)
        except (DamagedCheckpointError, UnsafeCheckpointError):
            refused += 1
    assert refused > len(content) // 2


@pytest.mark.parametrize("new_is_whole", [True, False])
def test_a_kill_between_the_two_renames_is_mended(new_is_whole: bool, folder: Path) -> None:
    with_checksums(folder)
    new, old = atomic.saving_path(folder), atomic.replaced_path(folder)
    shutil.copytree(folder, new)
    folder.rename(old)
    (old / "which").write_text("old")
    if not new_is_whole:
        (new / "checksums.json").unlink()
    find_whole(folder)
    assert (folder / "which").exists() != new_is_whole
    clear_leftovers(folder.parent)
    assert list(folder.parent.iterdir()) == [folder]


def test_no_code_runs_from_a_folder(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    payload = io.BytesIO()
    torch.save(Payload(witness), payload)
    bad = {
        ".metadata": (pickle.dumps(Payload(witness)), r"its .metadata names posix.system, which is no part of a"),
        "meta.pt": (payload.getvalue(), "meta.pt' is not loaded: it contains posix.system"),
    }
    # Another payload where a tensor is, and where a value is; the lengths are those that .metadata says.
    for index in integrity.read_metadata(folder).storage_data:
        metadata = pickle.loads(good[".metadata"])  # noqa: S301
        info = metadata.storage_data[index]
        info.offset, info.length = len(good["__0_0.distcp"]), len(payload.getvalue())
        shards = {".metadata": pickle.dumps(metadata), "__0_0.distcp": good["__0_0.distcp"] + payload.getvalue()}
        for name, content in (good | shards).items():
            (folder / name).write_bytes(content)
        with pytest.raises(UnsafeCheckpointError, match=r"last.ckpt' is not loaded: it contains posix.system"):
            consolidate_checkpoint(folder, tmp_path / "one.ckpt")
    for name, (content, message) in bad.items():
        for other, whole in good.items():
            (folder / other).write_bytes(whole)
        (folder / name).write_bytes(content)
        with pytest.raises(UnsafeCheckpointError, match=message):
            consolidate_checkpoint(folder, tmp_path / "one.ckpt")
    outside = pickle.loads(good[".metadata"])  # noqa: S301
    next(iter(outside.storage_data.values())).relative_path = "../../secret"
    (folder / "meta.pt").write_bytes(good["meta.pt"])
    (folder / ".metadata").write_bytes(pickle.dumps(outside))
    with pytest.raises(UnsafeCheckpointError, match=r"names ../../secret"):
        consolidate_checkpoint(folder, tmp_path / "one.ckpt")
    assert not witness.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_save_that_a_reader_has_put_in_place_is_saved(folder: Path) -> None:
    """A reader that finds no checkpoint between the two renames takes the new one; the writer then finds it renamed."""
    new = with_checksums(folder).rename(atomic.saving_path(folder))
    shutil.copytree(new, folder)
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if path == folder:
            find_whole(folder)  # as another process would
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        atomic.put_in_place(new, folder)
    assert list(folder.parent.iterdir()) == [folder]
    check_whole(folder)


def test_a_save_that_was_removed_is_an_error(folder: Path) -> None:
    new = with_checksums(folder).rename(atomic.saving_path(folder))
    shutil.copytree(new, folder)
    replace = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        shutil.rmtree(path)
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replaced)
        with pytest.raises(FileNotFoundError):
            atomic.put_in_place(new, folder)
    assert list(folder.parent.iterdir()) == [folder]
    check_whole(folder)
