"""Checks of saves of sharded checkpoints on two ranks, where the disk of one of them fails."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_muon.strategies import DamagedCheckpointError, SaveError, integrity
from lightning_muon.strategies.atomic import SummedFile, locked, saving_path
from lightning_muon.strategies.checkpoint_folder import find_whole_together, read_checkpoint_folder
from lightning_muon.strategies.folder_writer import write_folder
from tests.strategies.failing_disk import FailingDisk


def save(path: Path, step: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.full((6, 5000), float(step)), mesh, [Shard(0)])
    write_folder(path, {"state_dict": {"w": weight}}, {"global_step": step})


def step_of(path: Path) -> int:
    integrity.check_whole(path)
    loaded = read_checkpoint_folder(path)
    assert torch.equal(loaded["state_dict"]["w"], torch.full((6, 5000), float(loaded["global_step"])))
    return int(loaded["global_step"])


def shared(name: str) -> Path:
    """A new folder, the same on both ranks."""
    path = Path(name).resolve()
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    return path


def check_each_write_may_fail() -> None:
    path = shared("full") / "last.ckpt"
    save(path, 1)
    for rank in (0, 1):
        for operation in range(1, 60):
            with pytest.MonkeyPatch.context() as patch:
                disk = FailingDisk(patch)
                patch.setattr(SummedFile, "write", disk.counted(SummedFile.write))
                disk.left = operation if dist.get_rank() == rank else -1
                message = ""
                try:
                    save(path, 2)
                except SaveError as error:
                    message = str(error)
                failed: list[Any] = [None, None]
                dist.all_gather_object(failed, (disk.left <= 0 and dist.get_rank() == rank, message))
            if not any(found for found, _ in failed):
                break
            assert failed[0][1] == failed[1][1], failed  # both know, or none: the name could not be synced
            if message:
                assert message.startswith(f"'{path}' could not be saved: No space left on device; the checkpoint under")
                assert "\n" not in message
            assert list(path.parent.iterdir()) == [path]
            step_of(path)
            dist.barrier()
        assert operation > (12 if rank == 0 else 3), operation
    assert step_of(path) == 2


def check_a_mixed_folder_is_refused_on_all_ranks() -> None:
    folder = shared("mixed")
    first, second = folder / "first.ckpt", folder / "second.ckpt"
    save(first, 1)
    save(second, 2)
    names = sorted(file.name for file in second.iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.json", "meta.pt"]
    for name in names:
        mixed = folder / "mixed.ckpt"
        if dist.get_rank() == 0:
            shutil.copytree(second, mixed)
            shutil.copy(first / name, mixed / name)
        dist.barrier()
        with pytest.raises(DamagedCheckpointError) as caught:
            find_whole_together(mixed)
        message = str(caught.value)
        assert message.startswith(f"the checkpoint '{mixed}' is damaged: ")
        assert message.endswith(f"; use '{second}', the newest whole one beside it")
        assert name == "checksums.json" or f"{name} has" in message or f"{name} is of the save" in message, message
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(mixed)
    dist.barrier()


def check_two_runs_do_not_save_to_one_folder() -> None:
    path = shared("two") / "last.ckpt"
    if dist.get_rank() == 0:
        saving_path(path).mkdir()
        with locked(saving_path(path)), pytest.raises(SaveError, match="is being saved by another process"):
            save(path, 1)
    else:
        with pytest.raises(SaveError, match="is being saved by another process"):
            save(path, 1)
    save(path, 2)  # what is left of it is removed
    assert step_of(path) == 2
