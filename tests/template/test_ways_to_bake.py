"""All ways to generate a project: from a folder or a git URL, vendored or as a dependency; test_cruft.py has cruft."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
ROOMS = [path.name for path in (REPOSITORY / "template").glob("*/src/lightning_muon/*") if path.is_dir()]

# The links at the root lead to the folder, which earlier versions asked for.
ROOT_OR_FOLDER = [(), pytest.param(("--directory", "template"), marks=pytest.mark.slow)]

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
    # The presets are data.
    assert pyproject["tool"]["setuptools"]["packages"] == sorted([*packages, "lightning_muon.configs"])


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


@pytest.mark.parametrize("options", ROOT_OR_FOLDER)
def test_from_a_folder(bake: Run, tmp_path: Path, checkout: Path, options: tuple[str, ...]) -> None:
    assert bake(checkout, *options).returncode == 0
    assert is_complete(tmp_path / "my-muon-project")


@pytest.mark.parametrize("options", ROOT_OR_FOLDER)
def test_from_a_git_address(bake: Run, tmp_path: Path, repository_url: str, options: tuple[str, ...]) -> None:
    finished = bake(repository_url, *options)
    assert finished.returncode == 0, finished.stderr
    assert is_complete(tmp_path / "my-muon-project")


def test_by_questions_and_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cookiecutter", "--default-config", str(REPOSITORY)]
    # By default the first prompt is already one of the project: the only template is not asked for.
    prompts = json.loads((REPOSITORY / "cookiecutter.json").read_text())
    given = {"project_name": "Asked For", "license": "2", "installer": "2"}
    answers = "".join(given.get(prompt, "") + "\n" for prompt in prompts if not prompt.startswith("_"))
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
    assert "template" not in finished.stdout.partition("Project name")[0]
    assert "Folder and distribution name (asked-for)" in finished.stdout
    assert "MIT License" in (tmp_path / "asked-for" / "LICENSE").read_text()
    assert (tmp_path / "asked-for" / ".python-version").is_file()


def test_caches_of_the_checkout_stay_behind(bake: Run, tmp_path: Path, checkout: Path) -> None:
    for cache in ("optim/__pycache__/stale.pyc", "configs/.ruff_cache/stale", "cli/.mypy_cache/3.11/stale"):
        (checkout / cache).parent.mkdir(parents=True, exist_ok=True)
        (checkout / cache).write_bytes(b"stale")
    assert bake(checkout).returncode == 0
    names = {path.name for path in (tmp_path / "my-muon-project").rglob("*")}
    assert names.isdisjoint({"__pycache__", ".ruff_cache", ".mypy_cache", "stale", "stale.pyc"})


@pytest.mark.parametrize(
    ("options", "message"),
    [((), "cookiecutter.json"), (("--directory", "template"), "git config --global core.symlinks true")],
)
def test_a_checkout_without_symbolic_links_is_refused(
    bake: Run, tmp_path: Path, checkout: Path, options: tuple[str, ...], message: str
) -> None:
    for link in [path for path in checkout.rglob("*") if path.is_symlink()]:
        target = link.readlink()
        link.unlink()
        link.write_text(target.as_posix())  # what git writes where core.symlinks is false
    finished = bake(checkout, *options)
    assert finished.returncode != 0
    assert message in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "my-muon-project").exists()


def requirement(project: Path) -> str:
    """The line of pyproject.toml that requires lightning-muon, after the words about it."""
    requirements = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    (found,) = (text for text in requirements if text.startswith("lightning-muon"))
    assert Requirement(found).url
    return str(found)


def head(repository: Path) -> str:
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


@pytest.mark.parametrize(("options", "relative"), [((), True), (("--directory", "template"), False)])
def test_a_dependency_comes_from_the_folder_of_the_template(
    bake: Run, tmp_path: Path, checkout: Path, options: tuple[str, ...], relative: bool
) -> None:
    template = checkout.relative_to(tmp_path) if relative else checkout
    finished = bake(template, *options, "--output-dir", "some where", lightning_muon="dependency")
    assert finished.returncode == 0, finished.stderr
    project = tmp_path / "some where" / "my-muon-project"
    assert requirement(project) == f"lightning-muon @ {checkout.as_uri()}"  # with %20
    assert "# Only this machine has it" in (project / "pyproject.toml").read_text()
    assert not (project / "src" / "lightning_muon").exists()


@pytest.mark.parametrize("options", ROOT_OR_FOLDER)
def test_a_dependency_comes_from_the_address_and_commit_of_the_template(
    bake: Run, tmp_path: Path, checkout: Path, repository_url: str, options: tuple[str, ...]
) -> None:
    assert bake(repository_url, *options, lightning_muon="dependency").returncode == 0
    found = requirement(tmp_path / "my-muon-project")
    assert found == f"lightning-muon @ git+{repository_url}@{head(checkout)}"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://user:secret@example.com/a/b.git", "git+https://example.com/a/b.git"),
        ("git+https://token@example.com/a/b", "git+https://example.com/a/b"),
        ("git@example.com:a/b.git", "git+ssh://git@example.com/a/b.git"),
        ("ssh://git@example.com:22/a/b.git", "git+ssh://git@example.com:22/a/b.git"),
        ("https://example.com/a b/c'd.git", "git+https://example.com/a%20b/c%27d.git"),
    ],
)
def test_an_address_is_one_that_pip_takes_and_has_no_secrets(address: str, expected: str) -> None:
    source = (REPOSITORY / "template" / "hooks" / "post_gen_project.py").read_text()
    answers = json.dumps({"_template": address, "_commit": "0" * 40})
    hook = ModuleType("post_gen_project")
    exec(compile(source.replace("{{ cookiecutter | tojson }}", answers), "hook", "exec"), hook.__dict__)  # noqa: S102 - ours
    assert hook.source_of_lightning_muon() == (f"{expected}@{'0' * 40}", False)
