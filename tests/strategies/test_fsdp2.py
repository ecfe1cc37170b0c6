"""Sharded training equals training on one device, whatever the options; and what cannot be is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_muon.strategies import FSDP2Strategy

Train = Callable[..., list[dict[str, Any]]]
AssertEqual = Callable[..., None]

BFLOAT16 = {"optimizer": "SGD", "lr": 0.2, "trainer": {"precision": "bf16-mixed"}}
VARIANTS: list[dict[str, Any]] = [
    {"then": "predict"},
    {"optimizer": "AdamW"},
    {"tied": True, "trainer": {"gradient_clip_val": 0.3}},
    {"optimizer": "SGD", "lr": 0.5, "trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    {"trainer": {"accumulate_grad_batches": 2, "val_check_interval": 4}},
    BFLOAT16,
]


@pytest.fixture(scope="module")
def on_one_device(train: Train) -> list[dict[str, Any]]:
    return train(1, *({"steps": 5, **variant} for variant in VARIANTS))


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        (1, "fsdp2"),
        (2, {"blocks": ["Block"]}),
        pytest.param(3, {"reshard_after_forward": False}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"replicate_size": 2, "accumulate_sharded": True, "find_unused_parameters": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_equals_one_device(
    world_size: int,
    strategy: Any,
    train: Train,
    on_one_device: list[dict[str, Any]],
    assert_equal: AssertEqual,
) -> None:
    results = train(world_size, *({"steps": 5, "strategy": strategy, **variant} for variant in VARIANTS))
    for variant, result, expected in zip(VARIANTS, results, on_one_device, strict=True):
        assert_equal(result, expected, tolerance=2e-2 if variant is BFLOAT16 else 1e-5)
        assert {name for name in result["weights"] if name != "head.weight" or "tied" not in variant} == {
            *result["sharded"]
        }
    expected_text = on_one_device[0]["predicted"]
    assert torch.equal(results[0]["predicted"], expected_text[: len(expected_text) // world_size])
    replicated = "Replicate()" if world_size == 4 else "Shard(dim=0)"
    assert replicated in results[0]["placements"]["head.weight"]


def test_what_the_module_shards_itself_counts(
    train: Train, on_one_device: list[dict[str, Any]], assert_equal: AssertEqual
) -> None:
    job = {"steps": 5, "strategy": "fsdp2"}
    complete, left_over = train(
        2, {**job, "shards_itself": "all"}, {**job, "shards_itself": "one block", "refused": True}
    )
    assert_equal(complete, on_one_device[0])
    assert "ValueError: configure_model has left offset, embedding.weight" in left_over["error"]
    assert "blocks.0" not in left_over["error"]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="replicate_size must be at least 1, got 0"):
        FSDP2Strategy(replicate_size=0)
    with pytest.raises(ValueError, match="state_dict_type must be 'sharded' or 'full', got 'whole'"):
        FSDP2Strategy(state_dict_type="whole")


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"strategy": {"blocks": ["Blok"]}}, "no module of class 'Blok'; did you mean 'Block'"),
        ({"strategy": {"replicate_size": 3}}, "replicate_size 3 does not divide the 2 devices"),
    ],
)
def test_what_cannot_be_is_refused(job: dict[str, Any], message: str, train: Train) -> None:
    (result,) = train(2, {"steps": 1, "refused": True, **job})
    assert message in result["error"]
