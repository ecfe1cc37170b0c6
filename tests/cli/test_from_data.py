"""``${from_data:…}``: a config takes a number from the data, whatever network is chosen."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor, nn

from lightning_muon.cli import MuonCLI, main
from tests.cli.conftest import TinyData, TinyModule

pytestmark = pytest.mark.timeout(60)

NETWORK = """
model:
  net:
    class_path: tests.cli.test_from_data.Narrow
    init_args: {inputs: "${from_data:features}"}
"""


class Narrow(nn.Module):
    def __init__(self, inputs: int, outputs: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


class Wide(Narrow):
    def __init__(self, inputs: int, width: int = 8) -> None:
        super().__init__(inputs, width)


class WithNet(TinyModule):
    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters(ignore=["net"])
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.net(inputs)
        return result + 0 * super().forward(inputs).mean()


class Measured(TinyData):
    made = 0
    read = 0

    def __init__(self, dim: int = 4, batch_size: int = 4) -> None:
        if dim > 100:
            raise ValueError("--data.dim: so many columns\nare in no file")
        type(self).made += 1
        super().__init__(dim, batch_size)

    @cached_property
    def features(self) -> int:
        type(self).read += 1
        return self.dim


Run = Callable[..., MuonCLI]


@pytest.fixture(autouse=True)
def _network() -> None:
    Path("net.yaml").write_text(NETWORK)
    Measured.made = Measured.read = 0


@pytest.fixture
def fit() -> Run:

    def run(*args: str) -> MuonCLI:
        return main(WithNet, Measured, default_config="default.yaml", args=["fit", "--config=net.yaml", *args])

    return run


def test_the_data_are_asked_and_the_answer_is_saved(fit: Run) -> None:
    cli = fit("--model.dim=6", "--trainer.default_root_dir=run")
    assert cli.model.net.layer.in_features == 6  # of ${model.dim}, which the data take
    assert Measured.made == 2  # the run's own, and one that was asked
    assert (cli.datamodule.features, Measured.read) == (6, 1)  # which the run's own has from it
    saved = yaml.safe_load(Path("run", "config.yaml").read_text())
    assert saved["model"]["net"]["init_args"] == {"inputs": 6, "outputs": 1}


def test_another_network_with_such_an_argument_gets_the_number(fit: Run) -> None:
    cli = fit("--model.net=tests.cli.test_from_data.Wide", "--model.net.width=3", "--data.dim=4")
    assert (cli.model.net.layer.in_features, cli.model.net.layer.out_features) == (4, 3)


def test_a_number_that_was_given_wins(fit: Run) -> None:
    assert fit("--model.net.inputs=4").model.net.layer.in_features == 4


def test_routes_know_the_number_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(WithNet, Measured, default_config="default.yaml", args=["routes", "--config=net.yaml", "--json"])
    assert end.value.code == 0
    assert '"name": "net.layer.weight",\n   "shape": [\n    1,\n    4\n   ]' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--data.dim=101", "--data.dim: so many columns are in no file"),
        ("--model.net.inputs=${from_data:featurs}", "${from_data:featurs}: Measured has no 'featurs'; did you mean"),
    ],
)
def test_what_the_data_do_not_know_is_told_in_a_line(
    fit: Run, capsys: pytest.CaptureFixture[str], option: str, line: str
) -> None:
    with pytest.raises(SystemExit) as end:
        fit(option)
    assert end.value.code == 2
    assert f"error: {line}" in capsys.readouterr().err


def test_without_data_there_is_nothing_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(WithNet, args=["fit", "--config=net.yaml"])
    assert "error: there is no data: choose some by --data" in capsys.readouterr().err
