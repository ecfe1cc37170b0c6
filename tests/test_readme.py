"""The Python examples of the README run unchanged; the page of presets has them all."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule

from lightning_muon.optim import MuonAdamW

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_lightning_example(
    regression: Callable[..., LightningModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class YourModule(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(make_optimizer=None)

    names: dict[str, Any] = {"YourModule": YourModule}
    exec(BLOCKS[0], names)  # noqa: S102 - that is the test
    metrics = names["trainer"].callback_metrics
    assert {"watch/weight_rms/max", "watch/orthogonality_error/max", "watch/weight_decay/matrix"} <= set(metrics)
    assert isinstance(names["trainer"].optimizers[0], MuonAdamW)


def test_the_plain_example(regression: Callable[..., LightningModule], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"model": regression(None)}
    exec(BLOCKS[1], names)  # noqa: S102 - that is the test
    assert "rule '*0.weight'" in capsys.readouterr().out
    rates = {group["name"]: group["lr"] for group in names["optimizer"].param_groups}
    assert set(rates.values()) == {0.02, 3e-4, 1e-3}


def test_every_example_is_tested() -> None:
    assert len(BLOCKS) == 2


def test_every_preset_is_on_its_page() -> None:
    page = (README.parent / "docs" / "presets.md").read_text()
    configs = README.parent / "configs"
    names = {str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml")} - {"default"}
    assert {name for name in names if f"`{name}`" not in page} == set()
