"""Refuse answers that could not become a working project, before anything is written.

cookiecutter renders this file and runs it inside the new, still empty folder; a non-zero exit removes that folder.
"""

import json
import keyword
import re
import sys
import unicodedata
from collections.abc import Iterator

# JSON is ASCII and escapes every quote and backslash, so that no answer can break out of the raw string.
ANSWERS: dict[str, str] = json.loads(r"""{{ cookiecutter | tojson }}""")

TEXTS = ("project_name", "project_slug", "package_name", "description", "author")

# Control characters, lone surrogates, line and paragraph separators: none belongs in a line of text.
UNWRITABLE = {"Cc", "Cs", "Zl", "Zp"}

# What the project itself imports, or has as a folder: a package of the same name would hide it.
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

# What pip would look for, or find already installed, under the project's own name.
TAKEN_DISTRIBUTIONS = {name.replace("_", "-") for name in TAKEN_PACKAGES}

# Windows keeps these names for itself, in every folder and with every extension.
TAKEN_FOLDERS = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def complaints_about_text(answers: dict[str, str]) -> Iterator[str]:
    """One line for each prompt that has no text where it needs some, or text that is not a line."""
    for prompt in ("project_name", "project_slug", "package_name"):
        if not answers[prompt].strip():
            yield f"{prompt}: it is empty; give it a name."
    for prompt in TEXTS:
        bad = next((char for char in answers[prompt] if unicodedata.category(char) in UNWRITABLE), None)
        if bad is not None:
            yield f"{prompt}: it holds the control character U+{ord(bad):04X}; write it as one plain line of text."


def complaint_about_slug(slug: str) -> str | None:
    """Why `slug` can not be both a folder and a distribution, or None where it can."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", slug):
        return "use letters, digits and single '-' between them, such as my-muon-project"
    if slug.partition(".")[0].lower() in TAKEN_FOLDERS:
        return "Windows reserves this name; choose another, such as my-muon-project"
    if re.sub(r"[-_.]+", "-", slug).lower() in TAKEN_DISTRIBUTIONS:
        return "a distribution that the project uses has this name; choose another, such as my-muon-project"
    return None


def complaint_about_package(package: str) -> str | None:
    """Why `package` can not be imported in the project, or None where it can."""
    if not (package.isascii() and package.isidentifier()):
        return "use ASCII letters, digits and '_', not starting with a digit, such as my_muon_project"
    if keyword.iskeyword(package):
        return "it is a keyword of Python; choose another, such as my_muon_project"
    # Compared without case, because some file systems do not see it either.
    if package.lower() in {name.lower() for name in sys.stdlib_module_names}:
        return "it would hide a module of Python's standard library; choose another, such as my_muon_project"
    if package.lower() in TAKEN_PACKAGES:
        return "the project imports or keeps something else under this name; choose another, such as my_muon_project"
    return None


def complaints(answers: dict[str, str]) -> Iterator[str]:
    """One line for each problem: the prompt, what was answered, and what to do."""
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
        # Answers may hold what a terminal's encoding lacks: escape it rather than fail on it.
        print(line.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    sys.exit(1 if found else 0)
