"""All ways to generate a project: from a folder or a git URL, vendored or as a dependency, by cookiecutter or cruft."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
ROOMS = [path.name for path in (REPOSITORY / "template").glob("*/src/lightning_muon/*") if path.is_dir()]

Run = Callable[..., subprocess.CompletedProcess[str]]


def files_below(folder: Path) -> Iterator[Path]:
    """The files that belong to a folder, relative to it."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part == "__pycache__" or part.endswith("_cache") for part in name.parts):
            yield name


def is_complete(project: Path) -> bool:
    """Whether a generated project has its package, its rooms and its configs."""
    parts = ["src/my_muon_project/module.py", "configs", "constraints.txt", *(f"src/lightning_muon/{r}" for r in ROOMS)]
    return all((project / part).exists() for part in parts)


def test_every_room_comes_along() -> None:
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    folders = [file.parent for room in ROOMS for file in (REPOSITORY / room).rglob("__init__.py")]
    packages = [".".join(("lightning_muon", *folder.relative_to(REPOSITORY).parts)) for folder in folders]
    assert pyproject["tool"]["setuptools"]["packages"] == sorted(packages)


def test_rooms_and_configs_are_copied_byte_for_byte(baked_project: Path) -> None:
    (task,) = (REPOSITORY / "template").glob("*/tasks/text")
    for room in ROOMS:
        assert set(files_below(baked_project / "src" / "lightning_muon" / room)) == set(files_below(REPOSITORY / room))
    copies = {
        f"src/lightning_muon/{room}/{path}": REPOSITORY / room / path
        for room in ROOMS
        for path in files_below(REPOSITORY / room)
    }
    for configs in (REPOSITORY / "configs", task / "configs"):
        copies |= {f"configs/{path}": configs / path for path in files_below(configs)}
    assert {Path("configs", path).as_posix() for path in files_below(baked_project / "configs")} <= set(copies)
    # The sections of the task's default config are merged into the common one; no line is lost.
    common, of_the_task = copies.pop("configs/default.yaml").read_text(), (task / "default.yaml").read_text()
    merged = (baked_project / "configs" / "default.yaml").read_text()
    expected, wanted = yaml.safe_load(common), yaml.safe_load(of_the_task)
    for section in expected.keys() | wanted.keys():
        expected[section] = (
            {**expected.get(section, {}), **wanted.get(section, {})} if section in wanted else expected[section]
        )
    assert yaml.safe_load(merged) == expected
    assert {*common.splitlines(), *of_the_task.splitlines()} == set(merged.splitlines())
    for copy, original in copies.items():
        assert (baked_project / copy).read_bytes() == original.read_bytes(), copy
    assert not any(path.is_symlink() for path in baked_project.rglob("*"))


def test_nothing_is_left_unrendered(baked_project: Path) -> None:
    for path in files_below(baked_project):
        assert "cookiecutter." not in str(path)
        text = (baked_project / path).read_text(encoding="utf-8")
        assert "{{ cookiecutter" not in text, path


def test_the_next_commands_start_where_the_user_stands(bake: Run, tmp_path: Path) -> None:
    lines = [line.strip() for line in bake(REPOSITORY, "--output-dir", "my projects").stdout.splitlines()]
    assert lines[-3:] == ["cd 'my projects/my-muon-project'", "make install", "make train"]
    assert (tmp_path / "my projects" / "my-muon-project").is_dir()


@pytest.mark.parametrize("options", [(), ("--directory", "template")])
def test_from_a_folder(bake: Run, tmp_path: Path, checkout: Path, options: tuple[str, ...]) -> None:
    assert bake(checkout, *options).returncode == 0
    assert is_complete(tmp_path / "my-muon-project")


@pytest.mark.parametrize("options", [(), ("--directory", "template")])
def test_from_a_git_address(bake: Run, tmp_path: Path, repository_url: str, options: tuple[str, ...]) -> None:
    finished = bake(repository_url, *options)
    assert finished.returncode == 0, finished.stderr
    assert is_complete(tmp_path / "my-muon-project")


def test_by_questions_and_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cookiecutter", "--default-config", str(REPOSITORY)]
    # The template, the prompts: the first answered, the licence chosen by its number, the others left as they are.
    answers = "1\nAsked For\n\n\n\n\n2\n\n\n"
    finished = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        input=answers,
        text=True,
        capture_output=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Folder and distribution name (asked-for)" in finished.stdout
    assert "MIT License" in (tmp_path / "asked-for" / "LICENSE").read_text()


def test_cruft_creates_a_project_and_brings_it_up_to_date(
    run: Run, tmp_path: Path, checkout: Path, repository_url: str, commit: Callable[[Path], None]
) -> None:
    project = tmp_path / "my-muon-project"
    finished = run("cruft", "create", repository_url, "--directory", "template", "--no-input", "--default-config")
    assert finished.returncode == 0, finished.stderr
    assert is_complete(project)
    commit(project)

    (checkout / "optim" / "later.py").write_text('"""Came later."""\n')
    commit(checkout)
    assert run("cruft", "check", "--project-dir", project).returncode == 1
    finished = run("cruft", "update", "--project-dir", project, "--skip-apply-ask")
    assert finished.returncode == 0, finished.stderr
    assert (project / "src" / "lightning_muon" / "optim" / "later.py").read_text() == '"""Came later."""\n'


def test_caches_of_the_checkout_stay_behind(bake: Run, tmp_path: Path, checkout: Path) -> None:
    for cache in ("optim/__pycache__/stale.pyc", "configs/.ruff_cache/stale", "cli/.mypy_cache/3.11/stale"):
        (checkout / cache).parent.mkdir(parents=True, exist_ok=True)
        (checkout / cache).write_bytes(b"stale")
    assert bake(checkout).returncode == 0
    names = {path.name for path in (tmp_path / "my-muon-project").rglob("*")}
    assert names.isdisjoint({"__pycache__", ".ruff_cache", ".mypy_cache", "stale", "stale.pyc"})


def test_a_checkout_without_symbolic_links_is_refused(bake: Run, tmp_path: Path, checkout: Path) -> None:
    for link in [path for path in (checkout / "template").rglob("*") if path.is_symlink()]:
        target = link.readlink()
        link.unlink()
        link.write_text(target.as_posix())  # what git writes where core.symlinks is false
    finished = bake(checkout)
    assert finished.returncode != 0
    assert "git config --global core.symlinks true" in finished.stderr
    assert not (tmp_path / "my-muon-project").exists()


def test_as_a_dependency(bake: Run, tmp_path: Path, checkout: Path) -> None:
    finished = bake(checkout, lightning_muon="dependency")
    project = tmp_path / "my-muon-project"
    assert not (project / "src" / "lightning_muon").exists()
    requirements = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "lightning-muon>=0.1,<1" in requirements

    assert "make install\n" in finished.stdout
    dry = subprocess.run(["make", "--dry-run", "install"], cwd=project, text=True, capture_output=True, check=True)
    assert f'"{checkout}" --editable' in dry.stdout


@pytest.mark.parametrize("options", [[], ["--directory", "template"]])
def test_a_dependency_comes_from_the_address_of_the_template(
    bake: Run, tmp_path: Path, repository_url: str, options: list[str]
) -> None:
    assert bake(repository_url, *options, lightning_muon="dependency").returncode == 0
    makefile = (tmp_path / "my-muon-project" / "Makefile").read_text()
    assert f"\nLIGHTNING_MUON ?= git+{repository_url}\n" in makefile
