"""Sharded checkpoints on two ranks: whole or the one before, in the background too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_muon.strategies import AsyncAtomicCheckpointIO, check_whole
from tests.processes import REPOSITORY, launch

Train = Callable[..., list[dict[str, Any]]]
AssertEqual = Callable[..., None]


def test_a_save_is_whole_on_all_ranks_or_on_none(tmp_path: Path) -> None:
    program = Path(__file__).with_name("folder_checks.py")
    launch(program, "check_*", 2, folder=tmp_path, path=[REPOSITORY])


def test_saved_in_the_background_it_resumes(train: Train, tmp_path: Path, assert_equal: AssertEqual) -> None:
    def job(steps: int, **options: Any) -> dict[str, Any]:
        checkpoints = ModelCheckpoint(tmp_path, save_last=True, save_top_k=1, every_n_train_steps=1)
        trainer = {
            "plugins": [AsyncAtomicCheckpointIO()],
            "callbacks": [checkpoints],
            "enable_checkpointing": True,
            "limit_val_batches": 1,
        }
        return {"strategy": "fsdp2", "steps": steps, "trainer": trainer, **options}

    train(2, job(3))
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["epoch=0-step=3.ckpt", "last.ckpt"]
    for folder in folders:
        check_whole(tmp_path / folder)
    (resumed,) = train(2, job(6, resume=str(tmp_path / "last.ckpt")))
    (straight,) = train(1, {"steps": 6, "trainer": {"limit_val_batches": 1}})
    assert_equal(resumed, straight)
