"""A NaN on one rank, or in one shard, ends the run on all ranks, and is skipped on all alike."""

from pathlib import Path

import pytest
import torch

from tests.processes import launch

PROGRAM = Path(__file__).with_name("guarded_training.py")


@pytest.mark.parametrize("world_size", [2])
def test_all_ranks_decide_alike(world_size: int, tmp_path: Path) -> None:
    cases = [
        (name, str(tmp_path / name), int(torch.randint(world_size, ())), int(torch.randint(4, 12, ())))
        for name in ("ddp", "fsdp2")
    ]
    ranks = launch(PROGRAM, "run", world_size, world_size, cases)
    assert ranks[1:] == ranks[:-1]
    for (name, folder, _, step), found in zip(cases, ranks[0], strict=True):
        newest = f"epoch={step // 3 * 3 - 1}-step={step // 3 * 3}.ckpt"
        assert found["error"].startswith(
            f"RunGuard: in step {step} the norm of the gradient of net.0.weight is not finite"
        ), name
        assert f"'{folder}/{newest}' (after {step // 3 * 3} steps)" in found["error"], name
        assert newest == max(found["checkpoints"], key=lambda file: int(file.partition("step=")[2][:-5]))
        assert found["finite"], name
        assert found["equal"], name
        assert found["skipped"] == 1, name
