"""Projects of every task, however lightning-muon comes and whatever installs it: complete, in good style, tested.

By default each task is generated twice and checked without being run. The slow tests run its own tests and mypy.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import REPOSITORY, run_module

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROMPTS = json.loads((REPOSITORY / "cookiecutter.json").read_text())
TASKS, INCLUSIONS, INSTALLERS = PROMPTS["task"], PROMPTS["lightning_muon"], PROMPTS["installer"]
# Every pair of a task with another answer.
PAIRS = [(task, *rest) for task in TASKS for rest in zip(INCLUSIONS, INSTALLERS, strict=True)]
ALL = list(product(TASKS, INCLUSIONS, INSTALLERS))

Bake = Callable[..., subprocess.CompletedProcess[str]]


def generate(bake: Bake, folder: Path, task: str, inclusion: str, installer: str, **others: str) -> Path:
    """Generate a project in a folder of its own, with a dev container if it is installed by uv."""
    where = folder / f"{task} {inclusion} {installer}"
    answers = {"task": task, "lightning_muon": inclusion, "installer": installer, **others}
    finished = bake(REPOSITORY, "--output-dir", str(where), **answers)
    assert finished.returncode == 0, finished.stderr
    return where / "my-muon-project"


def dockerfile(project: Path, instruction: str) -> Iterator[str]:
    """The arguments of an instruction of the Dockerfile, each time that it is there."""
    yield from re.findall(rf"^{instruction} (.*)$", (project / "Dockerfile").read_text(), flags=re.MULTILINE)


def check_files(project: Path, inclusion: str, installer: str) -> None:
    """Check that there is what was chosen, and nothing of what was not."""
    uv = installer == "uv"
    assert not (project / "tasks").exists()
    assert (project / "src" / "lightning_muon").exists() == (inclusion == "vendored")
    assert (project / "constraints.txt").exists() != uv
    assert (project / ".python-version").exists() == uv
    assert (project / ".devcontainer").exists() == uv
    for path in project.rglob("*"):
        if path.is_dir():
            assert any(path.iterdir()), path
        else:
            assert path.stat().st_size or path.name == "py.typed", path


def check_installation(project: Path, inclusion: str, installer: str) -> None:
    """Check that Makefile, pyproject.toml, CI and Dockerfile install the project in the way that was chosen."""
    uv = installer == "uv"
    pyproject = tomllib.loads((project / "pyproject.toml").read_text())
    requirements = pyproject["project"]["dependencies"]
    direct = [text for text in requirements if text.startswith("lightning-muon")]
    assert direct == ([f"lightning-muon @ {REPOSITORY.as_uri()}"] if inclusion == "dependency" else [])
    assert (
        "pytest>=8" in (pyproject["dependency-groups"] if uv else pyproject["project"]["optional-dependencies"])["dev"]
    )
    tested = (REPOSITORY / "constraints.txt").read_text().replace('"', "'").splitlines()[1:]
    assert pyproject["tool"].get("uv", {}).get("constraint-dependencies") == (tested if uv else None)

    dry = subprocess.run(["make", "--dry-run", "test"], cwd=project, text=True, capture_output=True, check=True)
    assert ("uv sync" in dry.stdout) == uv
    assert ("pip install --constraint constraints.txt --editable '.[dev]'" in dry.stdout) != uv
    # pip keeps another commit of the same version.
    assert ("pip uninstall -qq --yes lightning-muon" in dry.stdout) == (inclusion == "dependency" and not uv)
    (job,) = yaml.safe_load((project / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python-version"] == ["3.10", PROMPTS["python"][0]]
    assert any("setup-uv" in step.get("uses", "") for step in job["steps"]) == uv

    assert next(dockerfile(project, "FROM")) == f"python:{PROMPTS['python'][0]} AS python"
    for arguments in dockerfile(project, "COPY"):
        for name in arguments.split()[:-1]:
            assert name == "uv.lock*" or (project / name).exists(), name
    assert any(("uv sync" if uv else "pip install") in command for command in dockerfile(project, "RUN"))


def test_each_task_is_complete_and_in_good_style(bake: Bake, tmp_path: Path) -> None:
    for task, inclusion, installer in PAIRS:
        container = "yes" if installer == "uv" else "no"
        project = generate(bake, tmp_path, task, inclusion, installer, dev_container=container)
        check_files(project, inclusion, installer)
        check_installation(project, inclusion, installer)
    for command in (["check"], ["format", "--check"]):
        call = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        finished = subprocess.run(call, cwd=tmp_path, text=True, capture_output=True, check=False)
        assert finished.returncode == 0, finished.stdout + finished.stderr


def test_each_choice_of_a_preset_has_its_file() -> None:
    for prompt in ("optimizer", "strategy", "logger"):
        for choice in PROMPTS[prompt]:
            assert choice in PROMPTS["__prompts__"][prompt], choice
            is_default = choice == PROMPTS[prompt][0]
            assert is_default or (REPOSITORY / "configs" / prompt / f"{choice}.yaml").is_file(), choice


def test_chosen_presets_are_the_defaults_of_the_program(bake: Bake, tmp_path: Path) -> None:
    project = generate(bake, tmp_path, "text", "vendored", "pip", optimizer="polargrad", logger="csv", strategy="fsdp2")

    def config(*arguments: str) -> dict[str, Any]:
        small = ["--trainer.accelerator=cpu", "--model.net.dim=16", "--model.net.heads=2", "--print_config"]
        path = [project / "src"]
        printed = run_module("my_muon_project", "fit", *arguments, *small, folder=project, path=path)
        assert printed.returncode == 0, printed.stderr
        content: dict[str, Any] = yaml.safe_load(printed.stdout)
        return content

    default = config()
    assert default["model"]["optimizer"]["init_args"].items() >= {"lr": 0.2, "orthogonalizer": "qdwh"}.items()
    assert default["trainer"]["logger"]["class_path"].endswith(".CSVLogger")
    assert default["trainer"]["strategy"]["class_path"].endswith(".FSDP2Strategy")
    other = config("--config=configs/optimizer/moonlight.yaml", "--config=configs/strategy/ddp.yaml")
    optimizer = other["model"]["optimizer"]["init_args"]
    assert optimizer.items() >= {"lr": 0.02, "orthogonalizer": "newton_schulz", "nesterov": True}.items()
    assert other["trainer"]["logger"]["class_path"].endswith(".CSVLogger")
    assert other["trainer"]["strategy"] == "ddp"


@pytest.mark.slow  # minutes: the own tests of every kind of project, and mypy on it; by default only text's
@pytest.mark.parametrize(("task", "inclusion", "installer"), ALL)
def test_each_project_passes_its_own_tests_and_lint(
    bake: Bake, baked_project: Path, tmp_path: Path, task: str, inclusion: str, installer: str
) -> None:
    project = generate(bake, tmp_path, task, inclusion, installer)
    # mypy does not find an editable installation. A vendored copy has the same types.
    types = tmp_path / "types"
    types.mkdir()
    if inclusion == "dependency":
        (types / "lightning_muon").symlink_to(baked_project / "src" / "lightning_muon")
    finished = run_module("pytest", "-q", folder=project, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        call = [sys.executable, "-m", *command]
        paths = {**os.environ, "MYPYPATH": str(types)}
        done = subprocess.run(call, cwd=project, env=paths, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # half a minute, and asks the package index for the versions
@pytest.mark.skipif(find_spec("uv") is None, reason="needs uv")
@pytest.mark.parametrize("inclusion", INCLUSIONS)
def test_uv_makes_a_lock_file_of_the_tested_versions(bake: Bake, tmp_path: Path, inclusion: str) -> None:
    project = generate(bake, tmp_path, "text", inclusion, "uv")
    locked = subprocess.run(
        [sys.executable, "-m", "uv", "lock"], cwd=project, text=True, capture_output=True, check=False
    )
    if "error sending request" in locked.stderr.lower():
        pytest.skip("the package index is out of reach")
    assert locked.returncode == 0, locked.stderr
    packages = {
        package["name"]: package.get("version", "")
        for package in tomllib.loads((project / "uv.lock").read_text())["package"]
    }
    tested = dict(re.findall(r"^([\w-]+)==([^;\s]+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: packages[name].partition("+")[0] for name in ("torch", "lightning", "ruff")} == {
        name: tested[name] for name in ("torch", "lightning", "ruff")
    }
    assert ("lightning-muon" in packages) == (inclusion == "dependency")
