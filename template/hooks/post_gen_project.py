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
from urllib.parse import quote

# JSON is ASCII and escapes quotes and backslashes, so no answer can end the raw string.
ANSWERS: dict[str, str] = json.loads(r"""{{ cookiecutter | tojson }}""")

PROJECT = Path.cwd()
VENDORED = Path("src", "lightning_muon")

# What an address may have in it; the rest, such as a space, is written as %20.
PUNCTUATION_OF_URLS = "%:/?#[]@!$&()*+,;=~-._"

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


def settle_files() -> None:
    """Remove the files of what was not chosen."""
    if ANSWERS["installer"] == "uv":
        Path("constraints.txt").unlink()  # uv reads these versions in pyproject.toml
    else:
        Path(".python-version").unlink()  # pyenv refuses to start a python that it has not installed
    if ANSWERS["dev_container"] == "no":
        shutil.rmtree(".devcontainer")


def folder_of_the_template() -> Path | None:
    """Return the folder with the template, or None if it comes from a repository elsewhere."""
    template, repository = ANSWERS["_template"], ANSWERS.get("_repo_dir")
    if repository is None:  # cruft, which makes the path of a folder absolute
        return Path(template) if Path(template, "cookiecutter.json").is_file() else None
    if not repository.startswith(template):  # a clone
        return None
    # PWD is the working directory of the user's shell; cookiecutter has changed its own.
    starts = [Path(start) for start in (os.environ.get("PWD"), ANSWERS["_output_dir"]) if start]
    folders = [start / repository for start in starts if (start / repository / "cookiecutter.json").is_file()]
    if not folders:
        sys.exit(f"cannot find the folder '{template}' from here; give its absolute path to cookiecutter.")
    return folders[0].resolve()


def source_of_lightning_muon() -> tuple[str, bool]:
    """Return the address of this version of the template's repository for pip, and whether only this machine has it."""
    folder = folder_of_the_template()
    if folder:
        return (folder if (folder / "pyproject.toml").is_file() else folder.parent).as_uri(), True
    clone = ANSWERS.get("_repo_dir")
    if clone is None:  # cruft
        url, commit = ANSWERS["_template"], ANSWERS["_commit"]
    else:
        # The address may be an abbreviation such as gh:owner/name; the clone has the full one.
        url, commit = (git(clone, *arguments) for arguments in (("remote", "get-url", "origin"), ("rev-parse", "HEAD")))
    if Path(url).is_absolute():
        url = Path(url).as_uri()
    # pip does not support git's short form of ssh, user@host:path.
    url = re.sub(r"^([\w.-]+@[\w.-]+):", r"ssh://\1/", url.removeprefix("git+"))
    # A password or token in an address is not for pyproject.toml.
    url = re.sub(r"^(https?://)[^/@]*@", r"\1", url)
    return f"git+{quote(url, safe=PUNCTUATION_OF_URLS)}@{commit}", url.startswith("file:")


def git(folder: str, *arguments: str) -> str:
    """Return what git says of a clone."""
    finished = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"git {' '.join(arguments)} in {folder}: {finished.stderr.strip()}")
    return finished.stdout.strip()


def settle_lightning_muon() -> None:
    """Keep the copy of lightning-muon, or require it from the repository of the template."""
    if ANSWERS["lightning_muon"] == "vendored":
        return
    shutil.rmtree(VENDORED)
    address, only_here = source_of_lightning_muon()
    why = "The version that this project was generated with. PyPI refuses uploads with such an address."
    lines = [f"# {why}", f'"lightning-muon @ {address}",']
    if only_here:
        lines.insert(1, "# Only this machine has it: for CI, Docker and others, give git+https://…@commit.")
    pyproject = Path("pyproject.toml")
    text = pyproject.read_text(encoding="utf-8")
    pyproject.write_text(text.replace('"lightning-muon",', "\n    ".join(lines)), encoding="utf-8")


def from_where_the_user_stands(path: Path) -> Path:
    """Return `path` relative to the user's working directory if it is inside, else unchanged."""
    # PWD is that of the user's shell; cookiecutter has changed the working directory.
    stands = os.environ.get("PWD")
    if stands and path.is_relative_to(Path(stands).resolve()):
        return path.relative_to(Path(stands).resolve())
    return path


def next_commands() -> list[str]:
    """Return the commands that train the model."""
    needs_uv = ANSWERS["installer"] == "uv" and not shutil.which("uv")
    folder = shlex.quote(str(from_where_the_user_stands(PROJECT)))
    return [*(["pip install uv"] if needs_uv else []), f"cd {folder}", "make install", "make train"]


if __name__ == "__main__":
    require_real_folders()
    remove_droppings()
    settle_task()
    settle_license()
    settle_files()
    settle_lightning_muon()
    print("Your project is ready. Next:\n")
    for command in next_commands():
        print(f"    {command}")
