"""Several optimizers by manual optimization: a GAN, sharded, is that of one device, and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import launch

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
PROGRAM = Path(__file__).with_name("adversarial_training.py")


def assert_same(way: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["groups"] == expected["groups"], way
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, **CLOSE, msg=lambda m, n=name: f"{way}, {n}: {m}")
    for state, reference in zip(found["momentum"], expected["momentum"], strict=True):
        assert state.keys() == reference.keys(), way
        for name, value in reference.items():
            torch.testing.assert_close(state[name], value, **CLOSE, msg=lambda m, n=name: f"{way}, {n}: {m}")


@pytest.mark.slow  # six seconds
def test_a_gan_under_fsdp2(tmp_path: Path) -> None:
    first, second = launch(PROGRAM, "run", 2, str(tmp_path), timeout=90)
    expected = first["one device"]
    assert [groups[0][0] for groups in expected["groups"]] == ["matrix_generator", "matrix_critic"]
    assert not expected["sharded"]
    assert first["straight"]["sharded"]
    for way, result in [*first.items(), *second.items()]:
        assert_same(way, result, expected)
