"""Reject answers that do not give a working project, before any file is written.

cookiecutter renders this file and runs it inside the new, empty folder. A non-zero exit code removes the folder.
"""

import json
import keyword
import re
import sys
import unicodedata
from collections.abc import Iterator

# JSON is ASCII and escapes quotes and backslashes, so no answer can end the raw string.
ANSWERS: dict[str, str] = json.loads(r"""{{ cookiecutter | tojson }}""")

TEXTS = ("project_name", "project_slug", "package_name", "description", "author")

# Control characters, lone surrogates, line and paragraph separators: not allowed in a line of text.
UNWRITABLE = {"Cc", "Cs", "Zl", "Zp"}

# Names that the project imports or has as a folder: a package of the same name would hide them.
TAKEN_PACKAGES = {
    "build",
    "configs",
    "docs",
    "jsonargparse",
    "lightning",
    "lightning_fabric",
    "lightning_muon",
    "lightning_utilities",
    "logs",
    "mypy",
    "numpy",
    "omegaconf",
    "pytest",
    "pytorch_lightning",
    "rich",
    "ruff",
    "setuptools",
    "src",
    "tensorboard",
    "tests",
    "torch",
    "torchmetrics",
}

# Distributions that the project needs: pip would confuse a project of the same name with them.
TAKEN_DISTRIBUTIONS = {name.replace("_", "-") for name in TAKEN_PACKAGES}

# Windows reserves these names, in every folder and with every extension.
TAKEN_FOLDERS = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def complaints_about_text(answers: dict[str, str]) -> Iterator[str]:
    """Yield one line for each empty name and for each text with control characters."""
    for prompt in ("project_name", "project_slug", "package_name"):
        if not answers[prompt].strip():
            yield f"{prompt}: it is empty; enter a name."
    for prompt in TEXTS:
        bad = next((char for char in answers[prompt] if unicodedata.category(char) in UNWRITABLE), None)
        if bad is not None:
            yield f"{prompt}: it contains the control character U+{ord(bad):04X}; enter one plain line of text."


def complaint_about_slug(slug: str) -> str | None:
    """Return why `slug` cannot name a folder and a distribution, or None."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", slug):
        return "use letters, digits and '-' between them, such as my-muon-project"
    if slug.partition(".")[0].lower() in TAKEN_FOLDERS:
        return "Windows reserves this name; choose another, such as my-muon-project"
    if re.sub(r"[-_.]+", "-", slug).lower() in TAKEN_DISTRIBUTIONS:
        return "the project depends on a distribution of this name; choose another, such as my-muon-project"
    return None


def complaint_about_package(package: str) -> str | None:
    """Return why `package` cannot be imported in the project, or None."""
    if not (package.isascii() and package.isidentifier()):
        return "use ASCII letters, digits and '_', and no digit first, such as my_muon_project"
    if keyword.iskeyword(package):
        return "it is a Python keyword; choose another, such as my_muon_project"
    # Case is ignored, because some file systems ignore it.
    if package.lower() in {name.lower() for name in sys.stdlib_module_names}:
        return "it would hide a module of Python's standard library; choose another, such as my_muon_project"
    if package.lower() in TAKEN_PACKAGES:
        return "the project has another package or folder of this name; choose another, such as my_muon_project"
    return None


def complaints(answers: dict[str, str]) -> Iterator[str]:
    """Yield one line for each problem: the prompt, the answer, and what to do."""
    problems = list(complaints_about_text(answers))
    if problems:
        yield from problems
        return
    for prompt, complaint_about in (("project_slug", complaint_about_slug), ("package_name", complaint_about_package)):
        complaint = complaint_about(answers[prompt])
        if complaint:
            yield f"{prompt}: {answers[prompt]!r} does not work: {complaint}."


if __name__ == "__main__":
    found = list(complaints(ANSWERS))
    for line in found:
        # Escape characters that the terminal's encoding does not have.
        print(line.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    sys.exit(1 if found else 0)
