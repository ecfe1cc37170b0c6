"""After training: back to Hugging Face, and a file of prompts on several ranks."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import launch

PROGRAM = Path(__file__).with_name("after_training.py")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    return tmp_path


@pytest.mark.slow  # nine seconds; tests/callbacks/test_prediction_writer.py has the ranks of one callback
def test_prompts_on_two_ranks_have_the_texts_of_one(baked_project: Path, folder: Path) -> None:
    def in_project(function: str, world_size: int) -> None:
        source, configs = baked_project / "src", str(baked_project / "configs")
        launch(PROGRAM, function, world_size, configs, folder=folder, path=[source], process_group=False)

    prompts = ["the ", "quick brown", "f", "x" * 40, "dog"]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    in_project("text", 1)
    in_project("prompts", 2)
    files = [folder / f"{strategy}-{size}.csv" for strategy in ("ddp", "fsdp2") for size in (1, 2)]
    assert len({file.read_text() for file in files}) == 1
    assert files[0].read_text().startswith("prompt,completion\nthe ,")


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_of_hugging_face_goes_there_and_back(baked_project: Path, folder: Path) -> None:
    source, configs = baked_project / "src", str(baked_project / "configs")
    (found,) = launch(PROGRAM, "hugging_face", 1, configs, folder=folder, path=[source], process_group=False)
    assert found["moved"]
    assert found["same"]
    assert found["cache"] is True
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["files"])
    assert re.search(r"huggingface: exported \([\d,]+ parameters and buffers\)", found["line"])
