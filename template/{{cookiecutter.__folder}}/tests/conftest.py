"""Fixtures: a small set of data, and the command line on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_muon.cli import MuonCLI, main
from {{ cookiecutter.package_name }}.data import {{ cookiecutter.__data_class }}
from {{ cookiecutter.package_name }}.module import {{ cookiecutter.__module_class }}

CONFIGS = Path(__file__).parents[1] / "configs"
{%- if cookiecutter.task == "text" %}
NETWORK = ["--model.net.dim=16", "--model.net.depth=2", "--model.net.heads=2"]
SMALL = [*NETWORK, "--model.context=32", "--data.batch_size=4", "--data.files=corpus/*.txt"]
{%- endif %}

Run = Callable[..., MuonCLI]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread: small tensors are faster on it."""
    torch.set_num_threads(1)

{% if cookiecutter.task == "text" %}
@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Return a folder with twenty small text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"file {number}: the quick brown fox jumps over the lazy dog.\n" * 40)
    return folder
{% endif %}

@pytest.fixture
def run(examples: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the program on a small model and few data, in a folder with nothing else."""
    monkeypatch.chdir(examples.parent)

    def call(subcommand: str, *arguments: str) -> MuonCLI:
        quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        return main(
            {{ cookiecutter.__module_class }},
            {{ cookiecutter.__data_class }},
            default_config=CONFIGS / "default.yaml",
            args=[subcommand, *SMALL, *quiet, *arguments],
        )

    return call
