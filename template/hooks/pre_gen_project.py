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

# Letters of Korean, and a Braille pattern, that are drawn as nothing; beside them, all of category Cf (zero width, byte
# order marks, tags, marks that turn the direction of writing).
INVISIBLE = "\u115f\u1160\u2800\u3164\uffa0"

# Zero width, but parts of emoji and of the writing of several languages.
JOINERS = "\u200c\u200d"

# What a project installs, with all that this needs in turn: by import, and by the name of the distribution where it
# differs from that in more than "-" and "_".
IMPORTS = """
absl aiohappyeyeballs aiohttp aiosignal alembic antlr4 ast_serialize async_timeout attr attrs build cloudpickle colorama
colorlog contourpy cuda cycler dateutil docstring_parser exceptiongroup filelock fonttools frozenlist fsspec functorch
google greenlet grpc idna importlib_metadata importlib_resources iniconfig isympy jinja2 joblib jsonargparse kiwisolver
librt lightning lightning_fabric lightning_muon lightning_utilities mako markdown markdown_it markupsafe matplotlib
mdurl mlflow mpl_toolkits mpmath multidict mypy mypy_extensions mypyc narwhals networkx numpy nvidia omegaconf optuna
packaging pathspec pil pip pkg_resources pluggy propcache py pyarrow pygments pylab pyparsing pyproject_hooks pytest
pytest_timeout pytorch_lightning pytorch_optimizer rich ruff safetensors scipy setuptools six sklearn sqlalchemy sympy
tensorboard tensorboard_data_server threadpoolctl tomli torch torchgen torchmetrics tqdm triton typeshed_client
typing_extensions tzdata wandb werkzeug wheel yaml yarl zipp
"""
DISTRIBUTIONS = """
absl-py antlr4-python3-runtime grpcio markdown-it-py pillow protobuf python-dateutil pyyaml scikit-learn types-pyyaml
"""

# Other names that Python or the project gives a meaning: its folders, and modules that are found by their names.
TAKEN_PACKAGES = set(IMPORTS.split()) | {
    "configs",
    "conftest",
    "docs",
    "licenses",
    "lightning_logs",
    "logs",
    "scripts",
    "sitecustomize",
    "src",
    "test",
    "tests",
    "usercustomize",
}
TAKEN_DISTRIBUTIONS = {*DISTRIBUTIONS.split(), *IMPORTS.replace("_", "-").split()}

# The most characters of a name, so that lines with it keep to the style.
LONGEST_NAME = 64

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
            continue
        text = answers[prompt]
        hidden = next((char for before, char in zip(f" {text}", text) if is_hidden(char, before)), None)  # noqa: B905
        if hidden is not None:
            name = unicodedata.name(hidden, "without a name")
            yield f"{prompt}: it contains U+{ord(hidden):04X} ({name}), which nobody sees; enter it without."


def is_hidden(char: str, before: str) -> bool:
    """Return whether a character is invisible after the one before, or turns the direction of the text around it."""
    joins = char in JOINERS and not before.isascii()
    return char in INVISIBLE or (unicodedata.category(char) == "Cf" and not joins)


def complaint_about_slug(slug: str) -> str | None:
    """Return why `slug` cannot name a folder and a distribution, or None."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", slug):
        return "use letters, digits and '-' between them, such as my-muon-project"
    if len(slug) > LONGEST_NAME:
        return f"it has {len(slug)} characters; use at most {LONGEST_NAME}"
    if slug.partition(".")[0].lower() in TAKEN_FOLDERS:
        return "Windows reserves this name; choose another, such as my-muon-project"
    if re.sub(r"[-_.]+", "-", slug).lower() in TAKEN_DISTRIBUTIONS:
        return "the project depends on a distribution of this name; choose another, such as my-muon-project"
    return None


def complaint_about_package(package: str) -> str | None:
    """Return why `package` cannot be imported in the project, or None."""
    if not (package.isascii() and package.isidentifier()):
        return "use ASCII letters, digits and '_', and no digit first, such as my_muon_project"
    if len(package) > LONGEST_NAME:
        return f"it has {len(package)} characters; use at most {LONGEST_NAME}"
    if package.startswith("__") or not package.strip("_"):
        return "Python gives names with two underscores a meaning of its own; choose another, such as my_muon_project"
    if keyword.iskeyword(package):
        return "it is a Python keyword; choose another, such as my_muon_project"
    # Case is ignored, because some file systems ignore it.
    if package.lower() in {name.lower() for name in sys.stdlib_module_names}:
        return "it would hide a module of Python's standard library; choose another, such as my_muon_project"
    if package.lower() in TAKEN_PACKAGES:
        return "the project has or needs a package or folder of this name; choose another, such as my_muon_project"
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
