"""A NaN on one rank, or in one shard, ends the run on all ranks, and is skipped on all alike."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.processes import REPOSITORY, launch

PROGRAM = Path(__file__).with_name("guarded_training.py")


def assert_alike(world_size: int, cases: list[tuple[str, str, int, int]]) -> None:
    """Run the cases, each a strategy, a folder, and the rank and the step of a NaN; all ranks must end alike."""
    ranks = launch(PROGRAM, "run", world_size, world_size, cases, path=[REPOSITORY])
    assert ranks[1:] == ranks[:-1]
    for (name, folder, _, step), found in zip(cases, ranks[0], strict=True):
        newest = f"epoch={step // 3 * 3 - 1}-step={step // 3 * 3}.ckpt"
        # The first of which the rank has a part: a third rank has none of two rows, and FSDP1 gives it later ones.
        spoilt = rf"RunGuard: in step {step} the norm of the gradient of (net.\d.weight|attention.in_proj_weight) is"
        assert re.match(spoilt, found["error"]), name
        assert f"'{folder}/{newest}' (after {step // 3 * 3} steps)" in found["error"], name
        assert newest == max(found["checkpoints"], key=lambda file: int(file.partition("step=")[2][:-5]))
        assert found["finite"], name
        assert found["equal"], name
        assert found["skipped"] == 1, name


def drawn(world_size: int, folder: Path, ways: Iterable[str]) -> list[tuple[str, str, int, int]]:
    return [
        (way, str(folder / f"{number}"), int(torch.randint(world_size, ())), int(torch.randint(3, 12, ())))
        for number, way in enumerate(ways)
    ]


def test_all_ranks_decide_alike(tmp_path: Path) -> None:
    assert_alike(2, drawn(2, tmp_path, ("ddp", "fsdp2")))


@pytest.mark.slow  # two minutes: at many steps, on more ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_decide_alike_whenever_it_is(world_size: int, tmp_path: Path) -> None:
    assert_alike(world_size, drawn(world_size, tmp_path, ("ddp", "fsdp2", "fsdp") * 4))
