"""Arguments of AutoWeightDecay, and the runs that it refuses."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_muon.callbacks import AutoWeightDecay
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("limit", 0.0),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("horizon", -1),
        ("ramp_steps", 0),
        ("release", 1.0),
        ("smoothing", 1.0),
        ("every_n_steps", 0),
    ],
)
def test_bad_arguments_are_named(argument: str, value: float) -> None:
    with pytest.raises(MisconfigurationException, match=f"AutoWeightDecay: {argument} must be"):
        AutoWeightDecay(**{argument: value})


def test_an_optimizer_without_decay_is_refused(regression: Module, fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match="Rprop has no weight_decay in its group 'matrix'"):
        fit(regression(torch.optim.Rprop), callbacks=[AutoWeightDecay()])


growing = partial(MuonAdamW, lr=0.2, weight_decay=0.0)
steer = partial(AutoWeightDecay, horizon=50, ramp_steps=20)


def test_half_precision_cannot_decay_each_matrix_by_itself(regression: Module, fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match=r"per='matrix' needs weights in float32.*bfloat16.*net\.0"):
        fit(regression(growing), callbacks=[steer(target_rms=0.4, per="matrix")], precision="bf16-true")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_rms": 0.0}, "target_rms must be a positive number, 'bf16', or null for the limit, got 0.0"),
        ({"target_rms": math.nan}, "target_rms must be a positive number"),
        ({"target_rms": "fp8"}, "target_rms must be a positive number, 'bf16', or null for the limit, got 'fp8'"),
        ({"target_rms": 1.0, "per": "layer"}, "per must be 'group' or 'matrix', got 'layer'"),
        (
            {"target_rms": 1.0, "bounds": (0.5, 0.5)},
            "bounds must be two finite numbers, the first at least 0 and below",
        ),
        ({"target_rms": 1.0, "bounds": (-0.1, 0.5)}, "bounds must be two finite numbers"),
        ({"target_rms": 1.0, "bounds": (0.1,)}, "bounds must be two finite numbers"),
        ({"target_rms": 1.0, "bounds": 0.5}, "bounds must be two finite numbers"),
        ({"target_rms": 1.0, "bounds": (0.0, math.inf)}, "bounds must be two finite numbers"),
        ({"target_rms": 1.0, "per": ["group"]}, "per must be 'group' or 'matrix', got ['group']"),
        ({"target_rms": 1.0, "limit": 2.0}, "limit has no effect with target_rms=1.0: limit, weight_decay, release"),
        ({"target_rms": "bf16", "weight_decay": 0.1}, "weight_decay has no effect with target_rms='bf16'"),
        ({"target_rms": "bf16", "release": 0.1}, "release has no effect with target_rms='bf16'"),
        ({"per": "matrix"}, "per has no effect without target_rms: per, bounds belong to the mode with a target"),
        ({"bounds": (0.0, 0.5)}, "bounds has no effect without target_rms"),
    ],
)
def test_bad_arguments_of_a_target_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        AutoWeightDecay(**arguments)
    assert str(caught.value).startswith(f"AutoWeightDecay: {message}")


class Own(AutoWeightDecay):
    """What a user may derive."""


@pytest.mark.parametrize("second", [AutoWeightDecay, Own])
def test_two_are_refused(regression: Module, fit: Fit, second: Any) -> None:
    with pytest.raises(MisconfigurationException, match="AutoWeightDecay is in the trainer's callbacks more than once"):
        fit(regression(growing), callbacks=[AutoWeightDecay(), second(target_rms=0.5)])


def test_a_target_without_muon_groups_is_refused(regression: Module, fit: Fit) -> None:
    module = regression(lambda groups: torch.optim.AdamW([p for group in groups for p in group["params"]]))
    with pytest.raises(MisconfigurationException, match="no parameter group has algorithm='muon'"):
        fit(module, callbacks=[AutoWeightDecay(target_rms=0.5)])


@pytest.mark.parametrize("target", ["0.3", "bf16"])
def test_the_command_line_takes_it(target: str) -> None:
    """And what it writes can be read again."""
    parser = LightningArgumentParser()
    parser.add_class_arguments(AutoWeightDecay, "auto")
    options = parser.parse_args([f"--auto.target_rms={target}", "--auto.per=matrix", "--auto.bounds=[0.0, 0.5]"])
    again = parser.parse_string(parser.dump(options))
    callback = parser.instantiate(again).auto
    assert callback.target_rms == (target if target == "bf16" else float(target))
    assert (callback.per, callback.bounds) == ("matrix", (0.0, 0.5))
