"""What Lightning brings goes on under sharding: averaged weights, and modules among the hyperparameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.strategies import consolidate_checkpoint
from tests.processes import launch

Train = Callable[..., list[dict[str, Any]]]
AssertEqual = Callable[..., None]


@pytest.mark.slow  # ten seconds, for what Lightning's callback does
def test_averages_are_those_of_one_device(train: Train, assert_equal: AssertEqual, tmp_path: Path) -> None:
    """Weights and validation loss are averages; checkpoints have both, go on exactly, and move between the two."""
    names = ("exponential", "equal")
    half, full, sharded, without = (str(tmp_path / name) for name in ("half", "full", "sharded", "without"))
    job = {"steps": 8, "strategy": "fsdp2"}
    one = train(
        1,
        *({"steps": 8, "callbacks": [name], "save_at": {4: half + name}} for name in names),
        {"steps": 4, "save_at": {4: without}},
        {"steps": 8, "callbacks": ["equal"], "resume": without},
    )
    whole: dict[str, Any] = {"steps": 8, "strategy": {"state_dict_type": "full"}, "callbacks": ["equal"]}
    two = train(
        2,
        *({**job, "callbacks": [name], "save_at": {4: sharded + name}} for name in names),
        *({**job, "callbacks": [name], "resume": sharded + name} for name in names),
        *({**job, "callbacks": [name], "resume": half + name} for name in names),
        {**whole, "save_at": {4: full}},
        {**whole, "resume": full},
        {**job, "callbacks": ["equal"], "resume": without},
    )
    exponential, equal, _, started_later = one
    for place, result in enumerate(two[:-1]):
        assert_equal(result, exponential if place in {0, 2, 4} else equal)
    assert_equal(two[-1], started_later)
    consolidate_checkpoint(sharded + "equal", tmp_path / "file")
    files = [torch.load(file, weights_only=True) for file in (tmp_path / "file", full, half + "equal")]
    for found in files[:2]:
        for part in ("state_dict", "current_model_state"):
            for name, value in files[2][part].items():
                torch.testing.assert_close(found[part][name], value, atol=1e-5, rtol=0)
    (resumed,) = train(1, {"steps": 8, "callbacks": ["equal"], "resume": str(tmp_path / "file")})
    assert_equal(resumed, equal)


def test_the_average_of_epochs_is_refused(train: Train) -> None:
    (result,) = train(2, {"steps": 1, "strategy": "fsdp2", "callbacks": ["epochs"], "refused": True})
    assert result["error"].startswith("MisconfigurationException: StochasticWeightAveraging does not work with fsdp2")


@pytest.mark.parametrize("state_dict_type", ["sharded", pytest.param("full", marks=pytest.mark.slow)])
def test_modules_among_the_hyperparameters_are_left_out(
    state_dict_type: str, train: Train, assert_equal: AssertEqual, tmp_path: Path
) -> None:
    job = {"strategy": {"state_dict_type": state_dict_type}, "network": True}
    saved, resumed = str(tmp_path / "saved"), tmp_path / "saved"
    _, result, expected = train(
        2, {**job, "steps": 3, "save": saved}, {**job, "steps": 6, "resume": saved}, {**job, "steps": 6}
    )
    assert_equal(result, expected)
    checkpoint = torch.load(resumed / "meta.pt" if resumed.is_dir() else resumed, weights_only=True)
    assert checkpoint["hyper_parameters"] == {
        "job": {**job, "steps": 3, "save": saved},
        "settings": {"depth": 2},
        "width": 7,
    }


@pytest.mark.slow  # seven seconds
def test_a_backbone_that_is_unfrozen_later(tmp_path: Path) -> None:
    """Its parameters are routed, averaged over the ranks, and go on from a checkpoint; monitors wait for them."""
    program = Path(__file__).with_name("finetuning.py")
    (one,) = launch(program, "run", 1, "one", str(tmp_path), process_group=False)
    ways = ("ddp", "fsdp2")
    found = {way: launch(program, "run", 2, way, str(tmp_path)) for way in ways}
    straight = one[0]
    rate = 0.1 * 0.1 * 1.5**3
    assert [(name, algorithm, names) for name, algorithm, names, _ in straight["groups"]] == [
        ("head", "adamw", ["head.weight"]),
        ("vector", "adamw", ["head.bias"]),
        ("matrix", "muon", ["backbone.0.weight", "backbone.2.weight"]),
        ("vector_2", "adamw", ["backbone.0.bias", "backbone.2.bias", "backbone.3.weight", "backbone.3.bias"]),
    ]
    assert [lr for *_, lr in straight["groups"]] == pytest.approx([0.1, 0.1, rate, rate])
    assert "weight_rms/backbone.0.weight" in straight["measured"]
    for ranks in ([one], *found.values()):
        for results in ranks:
            assert results[0]["warnings"] == []
            for result in results:
                assert result["groups"] == straight["groups"]
                for name, value in straight["weights"].items():
                    torch.testing.assert_close(result["weights"][name], value, atol=1e-5, rtol=0)
