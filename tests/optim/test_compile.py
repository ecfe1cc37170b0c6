"""The compiled orthogonalizer: the same steps as without, one graph per shape, and training under Lightning."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch._dynamo.utils import counters

from lightning_muon.optim import MuonAdamW, orthogonalize

SHAPES = [(8, width) for width in range(8, 20)]  # more than torch compiles for without being asked


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the graphs that are captured, and run them without a C++ compiler."""
    compiled = sys.modules[orthogonalize.__module__]._compiled
    compiled.cache_clear()
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield counters["stats"]
    compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize(
    "orthogonalizer",
    ["polar_express", *(pytest.param(one, marks=pytest.mark.slow) for one in ("newton_schulz", "qdwh"))],
)
def test_every_shape_is_compiled_and_steps_as_before(orthogonalizer: Any, graphs: dict[str, int]) -> None:
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(*shape, bias=False) for shape in SHAPES)
        groups = [{"params": list(layers.parameters()), "algorithm": "muon"}]
        optimizer = MuonAdamW(groups, orthogonalizer=orthogonalizer, compile=compiled)
        for _ in range(2):
            for parameter in layers.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        weights.append(list(layers.parameters()))
        assert graphs["unique_graphs"] == (len(SHAPES) if compiled else 0)
    torch.testing.assert_close(weights[1], weights[0], atol=1e-7, rtol=0)


def test_it_trains_saves_and_loads_under_lightning(
    regression: type[LightningModule], fit: Callable[..., Trainer], graphs: dict[str, int], tmp_path: Path
) -> None:
    def module() -> Any:
        return regression(lambda groups: MuonAdamW(groups, lr=0.02, compile=True))  # type: ignore[call-arg]

    whole, half = module(), module()
    fit(whole, max_epochs=2)
    trainer = fit(half, max_epochs=1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    resumed = module()
    fit(resumed, max_epochs=2, ckpt_path=path)
    assert graphs["unique_graphs"] > 0
    assert list(torch.load(path, weights_only=False)["state_dict"]) == list(whole.state_dict())
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), atol=0, rtol=0)
