"""What Lightning's FSDPStrategy would resume wrongly is refused before."""

from pathlib import Path

import pytest
import torch

from lightning_muon.strategies import check_resumable

WEIGHTS = dict.fromkeys(["a", "b", "c"], 0)


def save(path: Path, *groups: dict[str, list[object]]) -> Path:
    torch.save({"state_dict": WEIGHTS, "optimizer_states": [{"state": {}, "param_groups": list(groups)}]}, path)
    return path


def test_only_numbers_in_the_order_of_the_model_pass(tmp_path: Path) -> None:
    by_groups = save(
        tmp_path / "one", {"params": [0, 1], "param_names": ["a", "c"]}, {"params": [2], "param_names": ["b"]}
    )
    with pytest.raises(ValueError, match=r"is from one device or DDP, .*resume it under --trainer.strategy fsdp2"):
        check_resumable(by_groups)
    with pytest.raises(ValueError, match="is from one device or DDP"):
        check_resumable(save(tmp_path / "nameless", {"params": [0, 1]}, {"params": [2]}))
    by_model = {"params": [0, 2], "param_names": ["a", "c"]}, {"params": [1], "param_names": ["b"]}
    check_resumable(save(tmp_path / "fsdp", *by_model))
    check_resumable(save(tmp_path / "single", {"params": [0, 1, 2]}))
