"""A generated project passes its own tests and lint rules, and builds."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, run_module

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def run(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module inside a project."""
    command = [sys.executable, "-m", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=project, env=variables, text=True, capture_output=True, check=False)


@pytest.fixture
def project(baked_project: Path, tmp_path: Path) -> Path:
    """A generated project that a test may write into."""
    return shutil.copytree(baked_project, tmp_path / "a project")


def test_its_own_tests_pass(project: Path) -> None:
    """But those of presets, which `test_every_answer.py` runs too, for every task."""
    finished = run_module("pytest", "-q", "-k", "not preset", folder=project)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout


def test_it_keeps_its_style(project: Path) -> None:
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        finished = run(project, "ruff", *command, ".")
        assert finished.returncode == 0, finished.stdout + finished.stderr


def test_its_style_is_ours(baked_project: Path) -> None:
    ours, theirs = (
        tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
        for folder in (REPOSITORY, baked_project)
    )
    assert (ours["select"], ours["ignore"]) == (theirs["select"], theirs["ignore"])


def test_it_runs_its_own_copy_of_lightning_muon(project: Path) -> None:
    code = "import lightning_muon.optim; print(lightning_muon.optim.__file__)"
    command = [sys.executable, "-c", code]
    finished = subprocess.run(
        command, cwd=project, env={**os.environ, "PYTHONPATH": "src"}, text=True, capture_output=True, check=True
    )
    assert Path(finished.stdout.strip()).is_relative_to(project)


def test_it_builds(baked_project: Path, project: Path, tmp_path: Path) -> None:
    finished = run(project, "build", "--no-isolation", "--outdir", str(tmp_path / "dist"))
    assert finished.returncode == 0, finished.stdout + finished.stderr

    wheel = zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist()
    assert {"my_muon_project/module.py", "my_muon_project/py.typed", "lightning_muon/optim/py.typed"} <= set(wheel)
    licences = {name.partition("/licenses/")[2] for name in wheel if "/licenses/" in name}
    assert licences == {"LICENSE", "src/lightning_muon/LICENSE"}
    assert not [name for name in wheel if name.startswith(("tests/", "configs/"))]

    (source,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    beside = [*(baked_project / "configs").rglob("*.yaml"), *(baked_project / "tests").glob("*.py")]
    assert {path.relative_to(baked_project).as_posix() for path in beside} <= names
    assert {"constraints.txt", "Makefile"} <= names
