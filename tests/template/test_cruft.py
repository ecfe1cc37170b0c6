"""A generated project goes on with later versions of its template, by cruft: edits of its owner stay."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SKELETON = "template/{{cookiecutter.__folder}}"
TASKS = json.loads((REPOSITORY / "cookiecutter.json").read_text())["task"]

Run = Callable[..., subprocess.CompletedProcess[str]]
Commit = Callable[[Path], None]


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text that is in a file once."""
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    file.write_text(text.replace(old, new))


def above(file: Path, line: str) -> None:
    """Add a line at the top of a file."""
    file.write_text(f"{line}\n{file.read_text()}")


def below(file: Path, line: str) -> None:
    """Add a line at the end of a file."""
    file.write_text(f"{file.read_text()}{line}\n")


def status(project: Path) -> dict[str, str]:
    """What git says of each changed file, such as ``M``; ``UU`` where two changes are in conflict."""
    command = ["git", "-C", str(project), "status", "--porcelain"]
    lines = subprocess.run(command, text=True, capture_output=True, check=True).stdout.splitlines()
    return {line[3:]: line[:2].strip() for line in lines}


@pytest.mark.slow  # 5 s each
@pytest.mark.parametrize("task", TASKS)
def test_edits_of_the_owner_and_of_later_versions_meet(
    run: Run, tmp_path: Path, checkout: Path, repository_url: str, commit: Commit, task: str
) -> None:
    project = tmp_path / "my-muon-project"
    answers = ["--no-input", "--default-config", "--extra-context", json.dumps({"task": task})]
    finished = run("cruft", "create", repository_url, *answers)
    assert finished.returncode == 0, finished.stderr
    commit(project)

    # The owner's: the ends of files, and one value of the configs.
    default, package = project / "configs" / "default.yaml", project / "src" / "my_muon_project"
    copies = [package / "data.py", package / "module.py", project / "src" / "lightning_muon" / "optim" / "schedules.py"]
    for file in copies:
        below(file, "OWNER = 1")
    edit(default, "log_every_n_steps: 25", "log_every_n_steps: 10")
    commit(project)

    # The template's second version: the tops of the same files, other values, a file more and one less, another task.
    of_the_task = checkout / SKELETON / "tasks" / task
    originals = [
        of_the_task / "src" / "data.py",
        of_the_task / "src" / "module.py",
        checkout / "optim" / "schedules.py",
    ]
    for file in originals:
        above(file, "# second version")
    edit(checkout / "configs" / "default.yaml", "every_n_steps: 100", "every_n_steps: 200")
    edit(of_the_task / "default.yaml", "trainer:\n", "trainer:\n  precision: bf16-mixed\n")
    (checkout / "optim" / "later.py").write_text('"""Came later."""\n')
    (checkout / "configs" / "debug" / "anomalies.yaml").unlink()
    (checkout / SKELETON / "tasks" / "later" / "src").mkdir(parents=True)
    (checkout / SKELETON / "tasks" / "later" / "src" / "data.py").write_text('"""Of another task."""\n')
    commit(checkout)
    assert run("cruft", "check", "--project-dir", project).returncode == 1
    finished = run("cruft", "update", "--project-dir", project, "--skip-apply-ask")
    assert finished.returncode == 0, finished.stderr

    for file in copies:
        text = file.read_text()
        assert text.startswith("# second version\n"), file
        assert text.endswith("OWNER = 1\n"), file
    settings = default.read_text()
    for line in ("log_every_n_steps: 10", "every_n_steps: 200", "precision: bf16-mixed"):
        assert line in settings
    assert set(status(project).values()) <= {"M", "A", "D"}
    assert (project / "src" / "lightning_muon" / "optim" / "later.py").is_file()
    assert not (project / "configs" / "debug" / "anomalies.yaml").exists()
    assert not list(project.rglob("*.rej"))
    assert not (project / "tasks").exists()
    commit(project)

    # The third changes what the owner has changed: both are shown.
    edit(checkout / "configs" / "default.yaml", "log_every_n_steps: 25", "log_every_n_steps: 50")
    commit(checkout)
    finished = run("cruft", "update", "--project-dir", project, "--skip-apply-ask")
    assert "conflict" in (finished.stdout + finished.stderr).lower()
    assert status(project)["configs/default.yaml"] == "UU"
    settings = default.read_text()
    assert settings.index("<<<<<<<") < settings.index("log_every_n_steps: 10") < settings.index("log_every_n_steps: 50")


# The same update, of one line.
@pytest.mark.slow
def test_a_dependency_follows_the_commit_of_the_template(
    run: Run, tmp_path: Path, checkout: Path, repository_url: str, commit: Commit
) -> None:
    def required() -> str:
        head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        made_of = subprocess.run(head, text=True, capture_output=True, check=True).stdout.strip()
        return f'"lightning-muon @ git+{repository_url}@{made_of}",'

    answers = ("--no-input", "--default-config", "--extra-context", '{"lightning_muon": "dependency"}')
    # As of projects that are older than the links at the root of the repository.
    assert run("cruft", "create", repository_url, "--directory", "template", *answers).returncode == 0
    project = tmp_path / "my-muon-project"
    assert required() in (project / "pyproject.toml").read_text()
    edit(project / "pyproject.toml", '"rich>=13",', '"rich>=14",')
    commit(project)
    below(checkout / "optim" / "schedules.py", "# second version")
    commit(checkout)
    assert run("cruft", "update", "--project-dir", project, "--skip-apply-ask").returncode == 0
    assert required() in (project / "pyproject.toml").read_text()
    assert '"rich>=14",' in (project / "pyproject.toml").read_text()
    assert set(status(project).values()) == {"M"}
