"""The examples of the page "In your Lightning project" run unchanged."""

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muon.optim import MuonAdamW, route_parameters

PAGE = (Path(__file__).parents[1] / "docs" / "in-a-lightning-project.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
Fit = Callable[..., Trainer]


def run(number: int, **names: Any) -> Any:
    exec(BLOCKS[number], names)  # noqa: S102 - that is the test
    return names


@pytest.fixture
def your_module(regression: Any) -> type[LightningModule]:
    class YourModule(regression):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(make_optimizer=None)

    return YourModule


def test_one_optimizer(your_module: type[LightningModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = run(0, YourModule=your_module)["trainer"]
    assert isinstance(trainer.optimizers[0], MuonAdamW)
    assert trainer.global_step == 10


def test_a_gan(fit: Fit) -> None:
    """That it trains the same when it is sharded is tests/strategies/test_several_optimizers.py."""
    networks = [
        nn.Sequential(nn.Linear(i, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, o)) for i, o in ((3, 2), (2, 1))
    ]
    gan = run(1)["GAN"](*networks)
    before = [p.detach().clone() for p in gan.parameters()]
    data: list[tuple[Tensor, Tensor]] = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]
    trainer = fit(gan, train_dataloaders=DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == 6
    names = [[group["name"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    assert names[0][0] == "matrix_generator"
    assert names[1][0] == "matrix_critic"
    assert not [p for p, b in zip(gan.parameters(), before, strict=True) if torch.equal(p, b)]


def test_layers_made_in_configure_model(regression: Any, fit: Fit) -> None:
    late = run(2)["Late"]

    class Training(late, regression):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            regression.__init__(self, lambda groups: MuonAdamW(groups, lr=0.02))
            self.net = None

    module: Any = Training()
    trainer = fit(module)
    assert trainer.optimizers[0].param_groups[0]["param_names"] == ["net.0.weight", "net.2.weight"]
    assert module.losses[-1] < module.losses[0]


def instantiated(node: Any) -> Any:
    """What ``hydra.utils.instantiate`` makes of a node with ``_partial_``."""
    node = dict(node)
    module, _, name = node.pop("_target_").rpartition(".")
    assert node.pop("_partial_")
    return partial(getattr(import_module(module), name), **node)


def test_hydra(your_module: type[LightningModule], fit: Fit) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = {name: instantiated(node) for name, node in yaml.safe_load(text).items()}
    module = run(3, YourModule=your_module)["WithHydra"](**config)
    trainer = fit(module)
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"matrix": 0.02, "head": 0.02, "vector": 0.02}
    assert type(trainer.lr_scheduler_configs[0].scheduler) is torch.optim.lr_scheduler.CosineAnnealingLR
    # As the template calls it:
    with pytest.raises(ValueError, match="algorithm"):
        config["optimizer"](params=module.parameters())
    # As it compiles, in setup:
    plain = [group["param_names"] for group in route_parameters(module)]
    module.net = torch.compile(module.net)
    assert [group["param_names"] for group in route_parameters(module)] == plain


def test_every_example_is_tested() -> None:
    assert len(BLOCKS) == 4
