"""Fixtures: a small set of data, and the command line on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_muon.cli import MuonCLI, main
from {{ cookiecutter.package_name }}.data import {{ cookiecutter.__data_class }}
from {{ cookiecutter.package_name }}.module import {{ cookiecutter.__module_class }}

CONFIGS = Path(__file__).parents[1] / "configs"
{% include "tasks/" ~ cookiecutter.task ~ "/conftest/small.py" %}
Run = Callable[..., MuonCLI]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread: small tensors are faster on it."""
    torch.set_num_threads(1)


{% include "tasks/" ~ cookiecutter.task ~ "/conftest/examples.py" %}

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
