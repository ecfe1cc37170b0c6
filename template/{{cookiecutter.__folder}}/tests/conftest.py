"""Fixtures: a small text, and the command line on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_muon.cli import MuonCLI, main
from {{ cookiecutter.package_name }}.data import TextData
from {{ cookiecutter.package_name }}.module import TextModule

CONFIGS = Path(__file__).parents[1] / "configs"

Run = Callable[..., MuonCLI]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread: small tensors are faster on it."""
    torch.set_num_threads(1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a folder with twenty small text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"file {number}: the quick brown fox jumps over the lazy dog.\n" * 40)
    return folder


@pytest.fixture
def run(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the program on a small model and the small text, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(subcommand: str, *arguments: str) -> MuonCLI:
        network = ["--model.net.dim=16", "--model.net.depth=2", "--model.net.heads=2"]
        small = [*network, "--model.context=32", "--data.batch_size=4"]
        quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--data.files={corpus}/*.txt"]
        return main(
            TextModule, TextData, default_config=CONFIGS / "default.yaml", args=[subcommand, *small, *quiet, *arguments]
        )

    return call
