"""Checkpoints from anywhere resume anywhere, exactly; what does not fit is refused, with its names."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.strategies import consolidate_checkpoint
from lightning_muon.strategies.model_state import load_model_state
from lightning_muon.strategies.optimizer_state import matched, named_state, numbered

Train = Callable[..., list[dict[str, Any]]]
AssertEqual = Callable[..., None]

PLACES: dict[str, tuple[int, Any]] = {
    "one device": (1, "auto"),
    "ddp on 2": (2, "ddp"),
    "fsdp2 on 2": (2, "fsdp2"),
    "fsdp2 on 2, one file": (2, {"state_dict_type": "full"}),
    "fsdp2 on 3": (3, "fsdp2"),
    "fsdp2 on 4": (4, "fsdp2"),
    "hsdp on 4": (4, {"replicate_size": 2}),
    "ddp on 2, sharded state": (2, "ddp"),
}
# Pairs of which one is among these reach every place, from every place; the slow form has all.
HUB = "one device"
RESHARDED = {("fsdp2 on 4", "fsdp2 on 3"), ("fsdp2 on 3", "hsdp on 4"), ("fsdp2 on 3", "fsdp2 on 2, one file")}


@pytest.mark.parametrize("all_pairs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_checkpoint_resumes_anywhere(
    all_pairs: bool, train: Train, tmp_path: Path, assert_equal: AssertEqual
) -> None:
    def job(name: str, **options: Any) -> dict[str, Any]:
        sharded = {"shard_state": name.endswith("sharded state")}
        return {"strategy": PLACES[name][1], "options": sharded, **options}

    saved = {name: tmp_path / f"{name}.ckpt" for name in PLACES}
    by_size = {size: [name for name in PLACES if PLACES[name][0] == size] for size, _ in PLACES.values()}
    for size, names in by_size.items():
        train(size, *(job(name, steps=3, save=str(saved[name])) for name in names))
    folders = {"fsdp2 on 2", "fsdp2 on 3", "fsdp2 on 4", "hsdp on 4"}
    assert {name for name, path in saved.items() if path.is_dir()} == folders
    saved["consolidated"] = tmp_path / "consolidated.ckpt"
    consolidate_checkpoint(saved["fsdp2 on 3"], saved["consolidated"])

    (straight,) = train(1, job("one device", steps=6))
    for size, names in by_size.items():
        # A folder does not load without a sharding strategy: there its consolidated form does.
        jobs = [
            job(there, steps=6, resume=str(path))
            for there in names
            for here, path in saved.items()
            if (all_pairs or HUB in {here, there} or (here, there) in RESHARDED)
            and not (path.is_dir() and PLACES[there][1] in ("auto", "ddp"))
        ]
        for result in train(size, *jobs):
            assert_equal(result, straight)


class TwoLayers(nn.Module):
    def __init__(self, **names: int) -> None:
        super().__init__()
        for name, size in names.items():
            self.add_module(name, nn.Linear(size, size, bias=False))

    def trained(self, *groups: str, names: bool = True) -> torch.optim.AdamW:
        """An optimizer of these layers, one group each, after a step with gradients of their own."""
        made: list[dict[str, Any]] = [{"params": [self.get_submodule(name).weight]} for name in groups]
        for group, name in zip(made, groups, strict=True):
            if names:
                group["param_names"] = [f"{name}.weight"]
            group["params"][0].grad = torch.full_like(group["params"][0], float(len(name)))
        optimizer = torch.optim.AdamW(made)
        optimizer.step()
        return optimizer


def test_state_goes_by_name_where_there_are_names() -> None:
    model = TwoLayers(a=2, bb=2)
    saved, fresh = model.trained("a", "bb").state_dict(), model.trained("bb", "a")
    fresh.load_state_dict(matched(saved, fresh, model))
    assert [float(fresh.state[p]["exp_avg"].mean()) for p in model.parameters()] == pytest.approx([0.1, 0.2])
    # In sharded checkpoints the names are the keys.
    by_name = named_state(model.trained("a", "bb", names=False), model)
    assert sorted(by_name["state"]) == ["a.weight", "bb.weight"]
    foreign = model.trained("bb", "a", names=False)
    foreign.load_state_dict(matched(by_name, foreign, model))
    assert [float(foreign.state[p]["exp_avg"].mean()) for p in model.parameters()] == pytest.approx([0.1, 0.2])


def test_state_without_names_goes_by_the_place_in_the_groups() -> None:
    model = TwoLayers(a=2, bb=2)
    saved, fresh = model.trained("bb", "a", names=False).state_dict(), model.trained("bb", "a", names=False)
    fresh.load_state_dict(matched(saved, fresh, model))
    # Not by the place in model.parameters(), where a comes first.
    assert [float(fresh.state[p]["exp_avg"].mean()) for p in model.parameters()] == pytest.approx([0.1, 0.2])
    assert numbered(named_state(fresh, model))["param_groups"] == fresh.state_dict()["param_groups"]


def test_what_does_not_fit_is_named() -> None:
    model, other = TwoLayers(a=2, bb=2), TwoLayers(a=3, bb=2, c=2)
    saved = model.trained("a", "bb").state_dict()
    with pytest.raises(ValueError, match=r"only the optimizer has c.weight; only the checkpoint has bb.weight"):
        matched(saved, other.trained("a", "c"), other)
    with pytest.raises(ValueError, match=r"a.weight: exp_avg has the shape \(2, 2\) in the checkpoint, .*\(3, 3\)"):
        matched(saved, other.trained("a", "bb"), other)
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, the checkpoint's of \[1, 1\]"):
        matched(saved, model.trained("a", names=False), model)
    other_rate = copy.deepcopy(saved)
    other_rate["param_groups"][1]["lr"] = 0.5
    grouped = torch.optim.AdamW([{"params": model.parameters(), "param_names": ["a.weight", "bb.weight"]}])
    with pytest.raises(ValueError, match=r"group 0: lr is 0.001 for a.weight in the checkpoint and 0.5 for bb.weight"):
        matched(other_rate, grouped, model)
    with pytest.raises(ValueError, match=r"AdamW: parameter 0 of group 0, of shape .* is not one of the module's"):
        matched(saved, model.trained("a", "bb"), other)


def test_weights_load_all_or_none() -> None:
    model, other = TwoLayers(a=2, bb=2), TwoLayers(a=2, bb=3, c=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"bb.weight has the shape \(3, 3\) .*; c.weight is in the checkpoint"):
        load_model_state(model, other.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    del other.bb
    load_model_state(model, other.state_dict(), strict=False)
    assert torch.equal(model.a.weight, other.a.weight)
    assert torch.equal(model.bb.weight, before["bb.weight"])


def test_consolidating_overwrites_nothing_and_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no sharded checkpoint"):
        consolidate_checkpoint(tmp_path, tmp_path / "file")
    for name in ("meta.pt", ".metadata"):
        (tmp_path / name).touch()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="exists already"):
        consolidate_checkpoint(tmp_path, tmp_path / "file")


def test_state_in_fewer_bytes_resumes_on_any_number_of_processes(
    train: Train, tmp_path: Path, assert_equal: AssertEqual
) -> None:
    """With the same ``momentum_dtype`` and with another one, as one device does."""

    def job(kept: str, steps: int, strategy: Any = "fsdp2", **options: Any) -> dict[str, Any]:
        return {"strategy": strategy, "options": {"momentum_dtype": kept}, "steps": steps, **options}

    kinds = ("int8", "float32")
    saved = {kept: tmp_path / f"{kept}.ckpt" for kept in kinds}
    train(2, *(job(kept, 3, save=str(path)) for kept, path in saved.items()))
    files = {kept: tmp_path / f"{kept}.file" for kept in kinds}
    for kept, path in saved.items():
        consolidate_checkpoint(path, files[kept])
    pairs = [(before, after) for before in kinds for after in kinds]
    of_one = train(1, *(job(after, 6, "auto", resume=str(files[before])) for before, after in pairs))
    of_three = train(3, *(job(after, 6, resume=str(saved[before])) for before, after in pairs))
    straight = dict(zip(kinds, train(1, *(job(kept, 6, "auto") for kept in kinds)), strict=True))
    for (before, after), one, three in zip(pairs, of_one, of_three, strict=True):
        assert_equal(three, one)
        if before == after:
            assert_equal(one, straight[after])
        else:  # off by the rounding of the codes
            weights = [torch.cat([w.flatten() for w in r["weights"].values()]) for r in (one, straight[after])]
            assert 0 < (weights[0] - weights[1]).norm() < 0.02 * weights[1].norm()
