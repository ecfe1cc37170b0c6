"""Finish the generated project, and print the next commands.

cookiecutter renders this file and runs it inside the new project. A non-zero exit code removes the project.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cookiecutter.config import get_user_config

# JSON is ASCII and escapes quotes and backslashes, so no answer can end the raw string.
ANSWERS: dict[str, str] = json.loads(r"""{{ cookiecutter | tojson }}""")

PROJECT = Path.cwd()
VENDORED = Path("src", "lightning_muon")

# Caches of Python and of tools. cookiecutter copies them if they are in the checkout.
DROPPINGS = ("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", ".DS_Store")


def require_real_folders() -> None:
    """Exit if a symbolic link of the template was checked out as a text file with the path of its target."""
    folders = [Path("configs"), *(path for path in VENDORED.iterdir() if path.name != "LICENSE")]
    files = [path for path in folders if not path.is_dir()]
    if files:
        sys.exit(
            f"{files[0].as_posix()} should be a folder, but is a file: this copy of the template has no symbolic "
            "links. Run 'git config --global core.symlinks true' and clone it again. Do not use a zip archive."
        )


def remove_droppings() -> None:
    """Remove caches that were copied with the folders."""
    for folder in ("configs", "src", "tests"):
        for name in DROPPINGS:
            for dropping in list(Path(folder).rglob(name)):
                if dropping.is_dir():
                    shutil.rmtree(dropping)
                else:
                    dropping.unlink()


def settle_task() -> None:
    """Keep only the chosen task: its part of the package, of the tests and of the configs."""
    task = Path("tasks", ANSWERS["task"])
    targets = {"src": Path("src", ANSWERS["package_name"]), "tests": Path("tests"), "configs": Path("configs")}
    for part, target in targets.items():
        if (task / part).is_dir():
            shutil.copytree(task / part, target, dirs_exist_ok=True)
    default = Path("configs", "default.yaml")
    default.write_text(with_sections(*(path.read_text(encoding="utf-8") for path in (default, task / "default.yaml"))))
    shutil.rmtree("tasks")


def with_sections(common: str, of_the_task: str) -> str:
    """Return the YAML `common` with the sections of another, such as ``trainer:``, put first in those of the same name.

    As text: a parser would lose the comments.
    """
    for section in re.split(r"^(?=\w+:\n)", of_the_task, flags=re.MULTILINE)[1:]:
        head, _, body = section.partition("\n")
        before, found, after = common.partition(f"\n{head}\n")
        common = f"{before}{found}{body.rstrip()}\n{after}" if found else f"{common.rstrip()}\n\n{section.rstrip()}\n"
    return common


def settle_license() -> None:
    """Keep only the chosen licence."""
    Path("licenses", ANSWERS["license"]).replace("LICENSE")
    shutil.rmtree("licenses")


def place_of_lightning_muon() -> str:
    """Return where pip finds the repository of this template: its folder, or `git+URL`."""
    template = ANSWERS["_template"]
    clones = Path(get_user_config()["cookiecutters_dir"]).expanduser().resolve()
    if Path(template).is_dir() and not Path(template).resolve().is_relative_to(clones):
        folder = Path(template).resolve()
        return str(folder if (folder / "pyproject.toml").is_file() else folder.parent)
    url = template.removeprefix("git+")
    if "_repo_dir" in ANSWERS:
        # The address may be an abbreviation such as gh:owner/name; the clone has the full one.
        command = ["git", "-C", ANSWERS["_repo_dir"], "remote", "get-url", "origin"]
        cloned = subprocess.run(command, capture_output=True, text=True, check=False)
        url = cloned.stdout.strip() or url
    # pip does not support git's short form of ssh, user@host:path.
    url = re.sub(r"^([\w.-]+@[\w.-]+):", r"ssh://\1/", url)
    revision = ANSWERS.get("_checkout")
    return f"git+{url}@{revision}" if revision else f"git+{url}"


def from_where_the_user_stands(path: Path) -> Path:
    """Return `path` relative to the user's working directory if it is inside, else unchanged."""
    # PWD is that of the user's shell; cookiecutter has changed the working directory.
    stands = os.environ.get("PWD")
    if stands and path.is_relative_to(Path(stands).resolve()):
        return path.relative_to(Path(stands).resolve())
    return path


def next_commands() -> list[str]:
    """Return the three commands that train the model."""
    return [f"cd {shlex.quote(str(from_where_the_user_stands(PROJECT)))}", "make install", "make train"]


def say_where_the_dependency_is() -> None:
    """Write the source of lightning-muon into the Makefile, for `make install`."""
    makefile = Path("Makefile")
    place = place_of_lightning_muon().replace("$", "$$").replace("#", r"\#")
    text = makefile.read_text(encoding="utf-8")
    makefile.write_text(text.replace("LIGHTNING_MUON ?=", f"LIGHTNING_MUON ?= {place}"), encoding="utf-8")


if __name__ == "__main__":
    require_real_folders()
    remove_droppings()
    settle_task()
    settle_license()
    if ANSWERS["lightning_muon"] == "dependency":
        shutil.rmtree(VENDORED)
        say_where_the_dependency_is()
    print("Your project is ready. Next:\n")
    for command in next_commands():
        print(f"    {command}")
