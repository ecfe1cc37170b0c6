"""After training: the network without Lightning, back to Hugging Face, and a file of prompts on several ranks."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import launch

PROGRAM = Path(__file__).with_name("after_training.py")
# As `import lightning` is where it is not installed.
WITHOUT_LIGHTNING = """
import sys
sys.modules |= dict.fromkeys(["lightning", "lightning_fabric", "pytorch_lightning"])
sys.path.insert(0, sys.argv[1])
exec(open("example.py").read())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    return tmp_path


def test_the_example_of_the_readme_needs_no_lightning(baked_project: Path, folder: Path) -> None:
    """And prompts on two ranks have the texts that they have on one."""

    def in_project(function: str, world_size: int) -> None:
        source, configs = baked_project / "src", str(baked_project / "configs")
        launch(PROGRAM, function, world_size, configs, folder=folder, path=[source], process_group=False)

    prompts = ["the ", "quick brown", "f", "x" * 40, "dog"]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    in_project("text", 1)
    (example,) = re.findall(r"```python\n(.*?)```", (baked_project / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 11
    (folder / "example.py").write_text(example)
    command = [sys.executable, "-c", WITHOUT_LIGHTNING, str(baked_project / "src")]
    finished = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("def ")

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
