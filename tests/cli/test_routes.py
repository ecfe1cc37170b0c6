"""The command `routes`: the table and the JSON for any module, without training; what it refuses, in one line."""

import json
from pathlib import Path

import pytest

from lightning_muon.cli import main
from tests.cli.conftest import TinyData, TinyModule
from tests.processes import run_module

pytestmark = pytest.mark.timeout(60)

NETS = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

class Net(nn.Module):
    def __init__(self, dim, depth: int = 2):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.embedding = nn.Embedding(9, dim)
        self.blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.head = nn.Linear(dim, 9)

class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.wave = nn.Parameter(torch.zeros(4, 4, 4))
        self.net = Net(4)

class Module(LightningModule):
    def __init__(self, net: nn.Module, rules: list = None, per_head: bool = False):
        super().__init__()
        self.net, self.rules, self.per_head = net, rules, per_head

    def configure_model(self):
        self.late = nn.Linear(4, 4)

class Columns(LightningDataModule):
    def __init__(self, path: str = "none.csv"):
        super().__init__()
        self.path = path

    def setup(self, stage):
        self.count = len(open(self.path).readline().split(","))

class SizedByData(LightningModule):
    def __init__(self, dim: int = 8):
        super().__init__()
        self.dim = dim

    def configure_model(self):
        self.net = nn.Linear(self.trainer.datamodule.count, self.dim)

class OneColumn(LightningDataModule):
    count = 1

def built(width: int, bias: bool = True) -> Net:
    return Net(width)
"""
NAMES = ["embedding.weight", *(f"blocks.{i}.{name}" for i in range(2) for name in ("weight", "bias"))]
NAMES += ["head.weight", "head.bias"]


@pytest.fixture(autouse=True)
def _nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))


def ends(*args: str) -> int:
    """Run the command, and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(args=["routes", *args])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def table(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert ends(*args) == 0
    return capsys.readouterr().out


def algorithms(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, str]:
    """By name."""
    found = json.loads(table(capsys, *args, "--json"))
    return {route["name"]: route["algorithm"] for route in found["routes"]}


def test_the_table_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    found = table(capsys, "--model=some_nets.Net", "--model.dim=8")
    assert "│ muon       │ matrix    │ hidden matrix" in found
    assert "2, such as blocks.0.weight │      128 │" in found
    assert "Net: 7 parameters; elements: muon 128, adamw 169" in found
    rows = table(capsys, "--model=some_nets.Net", "--model.dim=8", "--every-parameter")
    assert all(f"│ {name} " in rows for name in NAMES)


def test_json_in_a_process_of_its_own(tmp_path: Path) -> None:
    """With everything that one may want to know, and nothing else on stdout."""
    arguments = ["--model=some_nets.Strange", "--json"]
    finished = run_module("lightning_muon.cli", "routes", *arguments, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["model"] == "some_nets.Strange"
    by_name = {route["name"]: route for route in found["routes"]}
    assert list(by_name) == ["wave", *(f"net.{name}" for name in NAMES)]
    assert by_name["net.blocks.1.weight"] == {
        "name": "net.blocks.1.weight",
        "shape": [4, 4],
        "algorithm": "muon",
        "role": "matrix",
        "confidence": "known",
        "reason": "hidden matrix",
        "options": {},
        "layout": {},
    }
    assert by_name["net.head.bias"]["options"] == {"weight_decay": 0.0}
    assert by_name["wave"]["confidence"] == "guess"
    (warning,) = found["warnings"]
    assert "wave" in warning
    assert not list(tmp_path.glob("lightning_logs"))


def test_a_guess_is_told_and_may_be_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends("--model=some_nets.Strange") == 0
    told = capsys.readouterr().err
    assert told.startswith("warning: ")
    assert '    Rule("wave", "adamw"),' in told.splitlines()  # to be copied
    assert ends("--model=some_nets.Strange", "--strict") == 2
    assert "wave" in capsys.readouterr().err
    assert ends("--model=some_nets.Strange", "--strict", "--rules=[{pattern: wave, algorithm: adamw}]") == 0


def test_functions_that_return_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(algorithms(capsys, "--model=some_nets.built", "--model.width=4")) == NAMES


def test_a_lightning_module_by_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rules hold, unless others are given; what `configure_model` adds is there; other sections are read."""
    (tmp_path / "run.yaml").write_text(
        "trainer: {max_steps: 4, callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}\n"
        "model:\n"
        "  class_path: some_nets.Module\n"
        "  init_args:\n"
        "    net: {class_path: some_nets.Net, init_args: {dim: '${trainer.max_steps}'}}\n"
    )
    found = algorithms(capsys, "--config=run.yaml")
    assert set(found) == {"late.weight", "late.bias", *(f"net.{name}" for name in NAMES)}
    assert found["net.blocks.0.weight"] == "muon"
    rules = "[{pattern: net.blocks.0.weight, algorithm: adamw}]"
    assert algorithms(capsys, "--config=run.yaml", f"--rules={rules}")["net.blocks.0.weight"] == "adamw"


def test_a_module_that_asks_for_the_data_gets_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.csv").write_text("a,b,c\n")
    for data, options, columns in (("Columns", ["--data.path=some.csv"], 3), ("OneColumn", [], 1)):
        with pytest.raises(SystemExit) as stop:
            main("some_nets.SizedByData", f"some_nets.{data}", args=["routes", "--json", *options])
        assert stop.value.code == 0
        shapes = {route["name"]: route["shape"] for route in json.loads(capsys.readouterr().out)["routes"]}
        assert shapes == {"net.weight": [8, columns], "net.bias": [8]}


def test_it_takes_the_arguments_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["routes", "--json", "--model.dim=6", "--trainer.max_steps=3", "--data.batch_size=2"]
    with pytest.raises(SystemExit) as stop:
        main(TinyModule, TinyData, default_config="default.yaml", args=arguments)
    assert stop.value.code == 0
    shapes = {route["name"]: route["shape"] for route in json.loads(capsys.readouterr().out)["routes"]}
    assert shapes["hidden_layer.weight"] == [6, 6]
    assert shapes["head.weight"] == [1, 6]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("", "a value is missing: --model"),
        ("--model=some_nets.Nett", "model: module some_nets has no Nett; did you mean 'Net'?"),
        ("--model=no_nets.Net", "model: cannot import no_nets.Net, there is no module 'no_nets'"),
        ("--model=some_nets.Net", "a value is missing for some_nets.Net: --model.dim"),
        ("--model=some_nets.Module --model.net=some_nets.Net", "a value is missing for some_nets.Net: --model.net.dim"),
        ("--model=some_nets.built", "a value is missing for some_nets.built: --model.width"),
        ("--model=some_nets.Net --model.dim=0", "dim must be at least 1, got 0"),
        ("--model=some_nets.Net --model.dim=4 --model.deth=1", "unknown key 'model.deth' for some_nets.Net; did you"),
        ("--model=some_nets.Net --model.dim=4 --jsn", "unknown key 'jsn'; did you mean 'json'?"),
        ('--model=some_nets.Net --model.dim=4 --rules=[{"pattern":"x","algorithm":"adamw"}]', "rule 'x' matches no"),
        ("--model=os.getcwd", "model: expected a Module, got 'os.getcwd'"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], args: str, line: str) -> None:
    assert ends(*args.split()) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {line}")
