"""Answers to the prompts: used unchanged if they work, rejected with a clear message if not."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
LICENSES = {
    "Apache-2.0": "Apache License",
    "MIT": "MIT License",
    "BSD-3-Clause": "BSD 3-Clause License",
    "Proprietary": "All rights reserved",
}

Bake = Callable[..., subprocess.CompletedProcess[str]]


def metadata(project: Path) -> dict[str, Any]:
    """The [project] table of a generated project."""
    table: dict[str, Any] = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


@pytest.mark.parametrize(
    "text",
    [
        "Jane O'Brien's \"Muon\"",
        r"C:\new\table \ \\ \"",
        "'''\"\"\" r'''",
        "Füße, 数学 und Ελληνικά",
        "🚀 👩‍💻 <b>[bold]*`#",
        "{ % } $HOME $(date) `date`",
    ],
)
def test_any_line_of_text_is_taken_as_it_is(bake: Bake, tmp_path: Path, text: str) -> None:
    answers = {"project_name": f"Muon {text}", "project_slug": "odd", "description": text, "author": text}
    finished = bake(REPOSITORY, **answers, license="MIT")
    assert finished.returncode == 0, finished.stderr

    project = tmp_path / "odd"
    table = metadata(project)
    assert table["description"] == text
    assert table["authors"] == [{"name": text}]
    assert text in (project / "LICENSE").read_text(encoding="utf-8")
    for source in project.rglob("*.py"):
        ast.parse(source.read_text(encoding="utf-8"), filename=str(source))


def test_the_readme_shows_text_rather_than_formatting(bake: Bake, tmp_path: Path) -> None:
    assert bake(REPOSITORY, project_name="A <b>*bold*</b> `name`", project_slug="odd").returncode == 0
    title = (tmp_path / "odd" / "README.md").read_text().splitlines()[0]
    assert title == r"# A &lt;b>\*bold\*&lt;/b> \`name\`"


def test_a_name_without_letters_gets_a_folder_nevertheless(bake: Bake, tmp_path: Path) -> None:
    assert bake(REPOSITORY, project_name="🚀").returncode == 0
    assert (tmp_path / "my-project" / "src" / "my_project").is_dir()


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("project_name", ""),
        ("project_name", "two\nlines"),
        ("description", "a bell \a"),
        ("author", "two\u2028lines"),
        ("project_slug", "with space"),
        ("project_slug", "-dash"),
        ("project_slug", "naïve"),
        ("project_slug", "nul.txt"),
        ("project_slug", "PyTorch_Lightning"),
        ("package_name", "3d"),
        ("package_name", "naïve"),
        ("package_name", "with-dash"),
        ("package_name", "class"),
        ("package_name", "json"),
        ("package_name", "Torch"),
        ("package_name", "lightning_muon"),
        ("package_name", "tests"),
        ("package_name", "../outside"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    bake: Bake, tmp_path: Path, prompt: str, answer: str
) -> None:
    before = set(tmp_path.iterdir())
    finished = bake(REPOSITORY, **{prompt: answer})
    assert finished.returncode != 0
    complaints = [line for line in finished.stderr.splitlines() if line.startswith(f"{prompt}: ")]
    assert len(complaints) == 1, finished.stderr
    assert set(tmp_path.iterdir()) == before


def test_every_problem_is_named_at_once(bake: Bake) -> None:
    finished = bake(REPOSITORY, project_slug="with space", package_name="class")
    assert "project_slug: 'with space'" in finished.stderr
    assert "package_name: 'class'" in finished.stderr


@pytest.mark.parametrize("lightning_muon", ["vendored", "dependency"])
@pytest.mark.parametrize("license_name", LICENSES)
def test_the_chosen_licence_is_the_one_that_stands(
    bake: Bake, tmp_path: Path, license_name: str, lightning_muon: str
) -> None:
    answers = {"license": license_name, "lightning_muon": lightning_muon, "author": "Jane Doe"}
    assert bake(REPOSITORY, **answers).returncode == 0
    project = tmp_path / "my-muon-project"
    text = (project / "LICENSE").read_text()
    assert LICENSES[license_name] in text
    assert ("Jane Doe" in text) == (license_name != "Apache-2.0")
    assert not (project / "licenses").exists()

    expression = {"Proprietary": "LicenseRef-Proprietary"}.get(license_name, license_name)
    if lightning_muon == "vendored" and license_name != "Apache-2.0":
        expression += " AND Apache-2.0"
    assert metadata(project)["license"] == expression
    for path in metadata(project)["license-files"]:
        assert (project / path).is_file()
