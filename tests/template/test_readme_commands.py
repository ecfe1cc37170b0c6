"""Each command in the README of a generated project runs, and its example of inference."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import launch

PROGRAM = Path(__file__).with_name("readme_commands.py")
MINE = """
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel


class Module(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", super().validation_step(batch, batch_idx)["x"])


class Data(BoringDataModule):
    pass
"""
NETS = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, width: int = 8) -> None:
        super().__init__(LAYERS)
"""
OF_COLUMNS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, numbers: int, categories: list[int], outputs: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(numbers + len(categories), width), nn.Linear(width, outputs))

    def forward(self, numbers, categories):
        return self.layers(torch.cat([numbers, categories], dim=1))
"""
# As `import lightning` is where it is not installed.
WITHOUT_LIGHTNING = """
import sys
sys.modules |= dict.fromkeys(["lightning", "lightning_fabric", "pytorch_lightning"])
sys.path.insert(0, "src")
exec(open("example.py").read())
"""
WORDS = ["the quick brown fox jumps over the lazy dog"]


def write_files(folder: Path, task: str) -> tuple[tuple[str, str], list[str]]:
    """Write the files that the commands name; return the classes, and options for small data and a small network."""
    (folder / "my.py").write_text(MINE)
    if task == "text":
        (folder / "my_nets.py").write_text(NETS.replace("LAYERS", "nn.Embedding(256, width), nn.Linear(width, 256)"))
        (folder / "corpus").mkdir()
        for name in ("a.txt", "corpus/b.txt", "prompts.txt"):
            (folder / name).write_text("\n".join(WORDS * (2 if name == "prompts.txt" else 99)))
        (folder / "gpt2").mkdir()
        tokenizers = pytest.importorskip("tokenizers")
        # More tokens than bytes: the network must get their number from the data.
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 300, "?": 1}, "?"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "gpt2" / "tokenizer.json"))
        network = ["--model.net.dim=16", "--model.net.depth=1", "--model.net.heads=2", "--model.sample_tokens=4"]
        return ("TextModule", "TextData"), [*network, "--model.context=16", "--data.files=a.txt", "--data.batch_size=2"]
    if task == "images":
        image = pytest.importorskip("PIL.Image")
        (folder / "my_nets.py").write_text(NETS.replace("LAYERS", "nn.Flatten(), nn.Linear(64, 10)"))
        for name in ("cat", "dog"):
            (folder / "pictures" / name).mkdir(parents=True)
            for number in range(20):
                image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "pictures" / name / f"{number}.png")
        (folder / "new").mkdir()
        image.new("L", (8, 8)).save(folder / "new" / "one.png")
        return ("ImageModule", "ImageData"), ["--data.batch_size=8"]
    if task == "table":
        (folder / "my_nets.py").write_text(OF_COLUMNS)
        rows = [f"{i % 7},{i % 5},{i % 7 * 10 + i % 5}.5" for i in range(100)]
        (folder / "houses.csv").write_text("\n".join(["rooms,garden,price", *rows]))
        columns = ["rooms", "garden", *(f"x{i + 1}" for i in range(10))]  # of both tables
        (folder / "new.csv").write_text(f"{','.join(columns)}\n{','.join('0' for _ in columns)}\n")
        return ("TableModule", "TableData"), ["--model.net.dim=16", "--data.batch_size=8"]
    (folder / "my_nets.py").write_text(
        NETS.replace("LAYERS", "nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 4)")
    )
    return ("Module", "Data"), ["--model.net.dim=16", "--data.batch_size=8"]


@pytest.mark.parametrize(
    "task",
    [
        "text",
        pytest.param("images", marks=pytest.mark.slow),  # a quarter of a minute each
        pytest.param("table", marks=pytest.mark.slow),
        pytest.param("bare", marks=pytest.mark.slow),
    ],
)
def test_commands(task: str, project_of: Callable[[str], Path], tmp_path: Path) -> None:
    project = shutil.copytree(project_of(task), tmp_path / "project")
    readme = (project / "README.md").read_text()
    lines = re.findall(r"^\$run (.*)$", readme, re.MULTILINE)
    # The first one predicts from a run that `make train` has made.
    commands = ["fit", *lines]
    assert len(commands) > 14
    classes, small = write_files(project, task)
    launch(PROGRAM, "run", 1, commands, classes, small, folder=project, path=[project / "src", project])
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (project / "example.py").write_text(example)
    command = [sys.executable, "-c", WITHOUT_LIGHTNING]
    finished = subprocess.run(command, cwd=project, text=True, capture_output=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    assert re.match(
        {"text": "def ", "images": "[0-9]$", "table": r"tensor\(\[", "bare": r"tensor\(\["}[task], finished.stdout
    )
