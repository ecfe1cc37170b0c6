"""Models of transformers and timm by config; what is told of an absent library and of settings that do not fit."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.cli import main
from lightning_muon.cli.models import hugging_face, timm_model

pytestmark = pytest.mark.timeout(120)

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}


@pytest.fixture
def _transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers", reason="transformers is not installed")


def routes(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main(args=["routes", *args, "--json"])
    assert stop.value.code == 0, capsys.readouterr().err
    return {route["name"]: route for route in json.loads(capsys.readouterr().out)["routes"]}


@pytest.mark.usefixtures("_transformers")
def test_random_and_saved_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = hugging_face(model_type="gpt2", overrides=SMALL)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 64)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")

    loaded = hugging_face(pretrained=str(tmp_path / "saved"))
    assert loaded.training
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.get_parameter(name).float()), name

    fresh = hugging_face(
        config=str(tmp_path / "saved"), model_class="GPT2ForSequenceClassification", overrides={"n_layer": 1}
    )
    assert {name.split(".")[2] for name, _ in fresh.named_parameters() if ".h." in name} == {"0"}
    assert not torch.equal(
        fresh.get_parameter("transformer.wte.weight"), loaded.get_parameter("transformer.wte.weight")
    )

    found = routes(capsys, f"--model={tmp_path / 'saved'}")
    assert set(found) == {name for name, _ in loaded.named_parameters()}
    assert found["transformer.h.1.attn.c_attn.weight"]["layout"] == {"blocks": 3, "transposed": True}


@pytest.mark.usefixtures("_transformers")
def test_routes_need_no_memory_for_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither of a large model nor of one inside a LightningModule."""
    found = routes(capsys, "--model=hf:mixtral", "--model.overrides.num_hidden_layers=1")
    experts = found["model.layers.0.mlp.experts.down_proj"]
    assert (experts["algorithm"], experts["shape"][0]) == ("muon", 8)
    assert found["lm_head.weight"]["role"] == "head"


@pytest.mark.usefixtures("_transformers")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of model_type, config and pretrained"),
        ({"model_type": "gpt2", "config": "x"}, "give one of model_type, config and pretrained"),
        ({"model_type": "gtp2"}, "transformers has no model_type 'gtp2'; did you mean 'gpt2'?"),
        ({"model_type": "gpt2", "overrides": {"n_layr": 2}}, "GPT2Config has no 'n_layr'; did you mean 'n_layer'?"),
        ({"model_type": "gpt2", "overrides": {"n_layer": "x"}}, "GPT2Config with {'n_layer': 'x'}: "),
        ({"model_type": "gpt2", "overrides": {**SMALL, "n_head": 7}}, "AutoModelForCausalLM of gpt2: "),
        (
            {"model_type": "gpt2", "model_class": "AutoModelForCausal"},
            "has no model 'AutoModelForCausal'; did you mean",
        ),
        ({"model_type": "gpt2", "model_class": "AutoModelForImageClassification"}, "of gpt2: Unrecognized config"),
        ({"config": "absent"}, "'absent' does not exist"),
        ({"pretrained": "absent"}, "'absent' does not exist"),
        ({"config": "not.json"}, "'not.json' is not JSON"),
        ({"config": "other.json"}, "'other.json' has no model_type"),
    ],
)
def test_settings_that_fit_to_nothing(settings: dict[str, Any], message: str) -> None:
    Path("not.json").write_text("{")
    Path("other.json").write_text("[1]")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        hugging_face(**settings)
    assert str(refused.value).startswith("hugging_face: ")
    assert message in str(refused.value)


@pytest.mark.parametrize(("model", "library"), [("hf:gpt2", "transformers"), ("timm:resnet18", "timm")])
def test_an_absent_library_is_named(
    model: str, library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SystemExit) as stop:
        main(args=["routes", f"--model={model}"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {library} is needed: pip install {library}"


@pytest.mark.parametrize(
    ("imports", "message"),
    [
        ("import absent_vision.ops", "timm needs absent_vision: pip install absent_vision"),
        ("raise RuntimeError('no operator nms')", "timm cannot be imported: no operator nms"),
    ],
)
def test_what_a_library_lacks_is_named(
    imports: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "timm.py").write_text(imports)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(args=["routes", "--model=timm:resnet18"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {message}"]


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the three functions of timm that are called: timm itself needs torchvision."""

    def create_model(_name: str, *, checkpoint_path: str = "", num_classes: int = 10) -> nn.Module:
        assert not checkpoint_path
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, num_classes))

    module = ModuleType("timm")
    functions = {"create_model": create_model, "is_model": lambda name: name == "resnet18"}
    for name, function in {**functions, "list_models": lambda: ["resnet18"]}.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("timm")
def test_timm_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = routes(capsys, "--model=timm:resnet18", "--model.options.num_classes=7")
    assert (found["2.weight"]["role"], found["2.weight"]["shape"]) == ("head", [7, 16])
    with pytest.raises(ValueError, match="timm has no model 'resnet81'; did you mean 'resnet18'"):
        timm_model("resnet81")
    with pytest.raises(ValueError, match=r"resnet18 with {'classes': 3}: .*unexpected keyword"):
        timm_model("resnet18", options={"classes": 3})
    with pytest.raises(FileNotFoundError, match=r"'absent\.pt' does not exist"):
        timm_model("resnet18", checkpoint="absent.pt")


def test_the_real_timm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="timm does not import: it needs torchvision", exc_type=ImportError)
    found = routes(capsys, "--model=timm:resnet18", "--model.options.num_classes=7")
    assert found["fc.weight"]["role"] == "head"
    assert found["layer1.0.conv1.weight"]["algorithm"] == "muon"
