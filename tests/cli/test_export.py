"""``export``: the weights of any checkpoint, by the names of the network, whole or not at all."""

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_model

from lightning_muon.cli import main
from tests.cli.network import Net, NetData, NetModule, fit, last

AVERAGED = "--trainer.callbacks+=EMAWeightAveraging"


def export(*arguments: str | Path, code: int = 0) -> None:
    with pytest.raises(SystemExit) as end:
        main(args=["export", *map(str, arguments)])
    assert end.value.code == code


@pytest.fixture
def checkpoint() -> Path:
    """Of a tied network, with averages."""
    fit("--model.net.tied=true", "--model.optimizer.lr=0.5", AVERAGED)
    return last(".")


def saved(checkpoint: Path, part: str) -> dict[str, Any]:
    state = torch.load(checkpoint, weights_only=True)[part]
    return {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}


def test_safetensors_rebuild_the_network(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options, part, told in (
        ("averages", (), "state_dict", "averages"),
        ("trained", ("--raw",), "current_model_state", "as trained"),
    ):
        file = Path("new", f"{name}.safetensors")
        export(checkpoint, file, *options)
        line = f"safetensors: {file} (52 parameters and buffers, {told}; without temperature)"
        assert line in capsys.readouterr().out
        with safe_open(file, "pt") as opened:
            assert sorted(opened.keys()) == ["embedding.weight", "hidden.bias", "hidden.weight"]
            description = json.loads(opened.metadata()["description"])
        assert description["class_path"] == "tests.cli.network.Net"
        assert (description["module"], description["data"]) == ({"scale": 1.0}, {"tokenizer": "bytes"})
        net = Net(**description["init_args"])
        load_model(net, file)
        expected = saved(checkpoint, part)
        assert expected.keys() == net.state_dict().keys()
        for key, value in net.state_dict().items():
            assert torch.equal(value, expected[key]), key
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(checkpoint.stat().st_mode)
    assert {path.name for path in Path("new").iterdir()} == {"averages.safetensors", "trained.safetensors"}
    assert not torch.equal(saved(checkpoint, "state_dict")["hidden.weight"], expected["hidden.weight"])


def test_a_state_dict_of_another_dtype(checkpoint: Path) -> None:
    export(checkpoint, "net.pt", "--dtype", "bfloat16")
    state = torch.load("net.pt", weights_only=True)
    expected = saved(checkpoint, "state_dict")
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in state.items())
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    assert json.loads(Path("net.json").read_text())["init_args"] == {"width": 4, "tied": True}


def test_a_network_that_nobody_names_keeps_the_names_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a._orig_mod.weight": torch.ones(2, 2)}, "hyper_parameters": {"a": 1}}, "own.ckpt")
    export("own.ckpt", "own.safetensors")
    assert "(4 parameters and buffers)" in capsys.readouterr().out
    with safe_open("own.safetensors", "pt") as file:
        assert list(file.keys()) == ["a.weight"]


class Unsafe:
    def __reduce__(self) -> Any:
        return os.system, ("touch witness",)


@pytest.mark.parametrize("part", [".metadata", "meta.pt", "file", "class"])
@pytest.mark.parametrize("command", [["export", "PATH", "out"], ["fit", "--weights", "PATH"]])
def test_no_code_runs(command: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("unsafe.ckpt")
    if part in {"file", "class"}:
        network = {"class_path": "os.system", "init_args": {"command": "touch witness"}}
        more = Unsafe() if part == "file" else None
        torch.save({"state_dict": {"net.w": torch.zeros(2)}, "hyper_parameters": {"net": network}, "more": more}, path)
    else:
        dcp.save({"state_dict": {"w": torch.zeros(2)}}, checkpoint_id=path, no_dist=True)
        torch.save({"global_step": Unsafe() if part == "meta.pt" else 1}, path / "meta.pt")
        if part == ".metadata":
            (path / ".metadata").write_bytes(pickle.dumps(Unsafe()))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(NetModule, NetData, args=[str(path) if word == "PATH" else word for word in command])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [entry.name for entry in Path().glob("*") if entry.suffix != ".yaml"] == ["unsafe.ckpt"]


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("absent.ckpt", "net.pt", "'absent.ckpt' does not exist; in '.' there are good.ckpt"),
        ("good.ckpt", "net.bin", "'net.bin': give a name that ends with .safetensors or .pt, or the name of a folder"),
        ("good.ckpt", "there.pt", "'there.pt' exists already: give another name"),
        ("good.ckpt", "described.pt", "'described.json' exists already: give another name"),
        ("good.ckpt", "folder", "the format huggingface is for networks of transformers"),
        ("torn.ckpt", "net.pt", "the checkpoint 'torn.ckpt' is damaged: its end is missing; use '"),
        ("text.ckpt", "net.pt", "'text.ckpt' is neither a checkpoint nor a file of weights"),
        ("unsafe.ckpt", "net.pt", "'unsafe.ckpt' is not loaded: it contains"),
        ("numbers.pt", "net.safetensors", "'numbers.pt' has no weights: no 'state_dict' and no tensors by name"),
        ("empty", "net.pt", "'empty' is neither a sharded checkpoint"),
    ],
)
def test_what_cannot_be_done_is_a_line(source: str, out: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"net.weight": torch.ones(2, 2)}}, "good.ckpt")
    Path("torn.ckpt").write_bytes(Path("good.ckpt").read_bytes()[:-30])
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {"net.weight": torch.ones(2, 2)}, "more": Unsafe()}, "unsafe.ckpt")
    torch.save({"numbers": [1, 2]}, "numbers.pt")
    Path("empty").mkdir()
    Path("there.pt").touch()
    Path("described.json").touch()
    before = sorted(Path().iterdir())
    export(source, out, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(Path().iterdir()) == before
