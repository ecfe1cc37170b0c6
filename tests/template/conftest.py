"""Fixtures that run the real cookiecutter on this repository."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "logs", "*.egg-info", ".*_cache")

Finished = subprocess.CompletedProcess[str]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Finished]:
    """`run(module, *arguments)`: a Python module in `tmp_path`, with a home folder of its own."""
    home = tmp_path / ".home"
    home.mkdir()
    (home / ".gitconfig").write_text("[user]\n    name = Tester\n    email = tester@example.com\n")
    environment = {**os.environ, "HOME": str(home), "PWD": str(tmp_path)}

    def run_module(module: str, *arguments: str | Path) -> Finished:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=60, check=False
        )

    return run_module


@pytest.fixture
def bake(run: Callable[..., Finished]) -> Callable[..., Finished]:
    """`bake(template, *options, **answers)`: cookiecutter in `tmp_path`, without questions."""

    def run_cookiecutter(template: str | Path, *options: str, **answers: str) -> Finished:
        extra = [f"{prompt}={answer}" for prompt, answer in answers.items()]
        return run("cookiecutter", "--no-input", "--default-config", *options, template, *extra)

    return run_cookiecutter


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this repository that a test may spoil."""
    # cookiecutter knows an address of git by "git" somewhere in it.
    folder = tmp_path / "check out" / "lightning-muon.git"
    shutil.copytree(REPOSITORY, folder, symlinks=True, ignore=LEFT_OUT)
    return folder


@pytest.fixture
def commit() -> Callable[[Path], None]:
    """`commit(folder)`: everything in it, to a git repository that is made where there is none."""

    def commit_all(folder: Path) -> None:
        git = ["git", "-C", str(folder), "-c", "user.name=Tester", "-c", "user.email=tester@example.com"]
        for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "All of it"]):
            subprocess.run([*git, *arguments], check=True, capture_output=True)

    return commit_all


@pytest.fixture
def repository_url(checkout: Path, commit: Callable[[Path], None]) -> str:
    """The address of a git repository that holds this one's files."""
    commit(checkout)
    return checkout.as_uri()
