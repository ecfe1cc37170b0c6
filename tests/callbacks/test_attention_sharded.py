"""Attention logits and QK-clip on two processes are those of one device."""

from pathlib import Path
from typing import Any

import pytest

from tests.processes import REPOSITORY, launch

PROGRAM = Path(__file__).with_name("sharded_attention.py")


def test_the_same_logits_and_the_same_clip_on_every_rank() -> None:
    """Each rank sees half of each batch; under FSDP1 QK-clip says what to take instead."""
    (alone,) = launch(PROGRAM, "find", 1, "one", path=[REPOSITORY])
    ranks = launch(PROGRAM, "find", 2, "ddp", "fsdp2", "fsdp", path=[REPOSITORY])
    assert len([tag for tag in alone["one"][-1] if "head_" in tag]) == 12
    assert len([tag for tag in alone["one"][1] if "head_" in tag]) == 8
    clips = [step["clipped_heads"] for step in alone["one clipped"]]
    assert clips[0] == 8
    late = [step.get("attention_logit/net.late.attention", 0.0) for step in alone["one clipped"]]
    assert late[:2] == [0.0, 0.0]
    assert late[2] > 0.2
    assert late[3] < 0.15  # found and clipped, although it was not there at first
    assert alone["one clipped"][-1]["attention_logit/max"] < 0.5 * alone["one"][-1]["attention_logit/max"]
    for way in ("ddp", "fsdp2", "fsdp"):
        for found in ranks:
            check(found[way], alone["one"])
            if way == "fsdp":
                assert "FSDP1 has flattened its weights: take strategy fsdp2" in found["fsdp clipped"]
            else:
                check(found[f"{way} clipped"], alone["one clipped"])


def check(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=1e-4)
