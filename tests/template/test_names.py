"""Names that answer the prompts: those that work give a project in good style, and those that cannot are refused.

The names are put to the hook itself, in this process; ``test_answers.py`` sends some through cookiecutter.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from cookiecutter.generate import generate_context
from cookiecutter.prompt import prompt_for_config
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEMPLATE = Path(__file__).parents[2] / "template"
SKELETON = TEMPLATE / "{{cookiecutter.__folder}}"
LONG = "a_package_with_a_name_that_says_all_there_is_to_say_about_itself"

Bake = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """The hook as a module, with no answers in it."""
    source = (TEMPLATE / "hooks" / "pre_gen_project.py").read_text().replace("{{ cookiecutter | tojson }}", "{}")
    module = ModuleType("pre_gen_project")
    exec(compile(source, "pre_gen_project.py", "exec"), module.__dict__)  # noqa: S102 - the hook of this repository
    return module


def complaints(hook: ModuleType, **answers: str) -> list[str]:
    """What the hook says about answers, the others being as they are by default."""
    context = generate_context(str(TEMPLATE / "cookiecutter.json"), extra_context=answers)
    return list(hook.complaints(prompt_for_config(context, no_input=True)))


REFUSED_PACKAGES = [
    # dependencies, and what they bring
    *("torch", "Torch", "numpy", "rich", "yaml", "omegaconf", "torchmetrics", "tensorboard", "matplotlib", "fsspec"),
    *("packaging", "tqdm", "jinja2", "sympy", "networkx", "google", "grpc", "PIL", "pil", "absl", "markdown", "six"),
    *("typing_extensions", "jsonargparse", "lightning_utilities", "pytorch_lightning", "lightning_fabric", "pylab"),
    *("functorch", "torchgen", "triton", "nvidia", "attr", "attrs", "aiohttp", "yarl", "pkg_resources", "dateutil"),
    # tools of the project
    *("pytest", "mypy", "ruff", "build", "setuptools", "pip", "pluggy", "pathspec", "iniconfig", "pyproject_hooks"),
    # Python's own
    *("json", "JSON", "types", "code", "test", "Test", "this", "antigravity", "site", "sitecustomize", "usercustomize"),
    *("__main__", "__init__", "__pycache__", "__future__", "_", "__", "class", "None", "True", "async", "idlelib"),
    # the project's own
    *("tests", "src", "configs", "docs", "scripts", "logs", "lightning_logs", "conftest", "lightning_muon"),
    # no names of a package at all
    *("3d", "with-dash", "with space", "a.b", "a/b", "../a", "naïve", "数学", "a\\b", "a'b", 'a"b', "a;b", "$a", "~"),
    *("-a", "a\u200bb", "\u202eabc", "a\u200db", "a" * 65),
]
REFUSED_SLUGS = [
    *("torch", "PyTorch_Lightning", "pytorch.lightning", "lightning-muon", "Types-PyYAML", "PyYAML", "pillow", "numpy"),
    *("protobuf", "python-dateutil", "absl-py", "markdown-it-py", "typing_extensions", "ruff", "build", "grpcio"),
    *("con", "NUL", "nul.txt", "com1", "LPT9.x", "aux", "prn"),
    *("a/b/c", "/a", "a/", "a\\b", "..", ".", ".hidden", "-dash", "dash-", "a b", "naïve", "a:b", "a*", "~", "#a"),
    *("a\u200bb", "\u202eabc", "\ufeffab", "a" * 65),
]
UNSEEN = [
    *("two\nlines", "a\tb", "\x1b[31mred", "\x00", "a bell \a", "two\u2028lines", "a\x85b", "\ud800", "j\u200doined"),
    *("zero\u200bwidth", "\ufeffmark", "\u202egnirts", "\u2066isolate\u2069", "left\u200eright", "\u200frtl"),
    *("soft\u00adhyphen", "word\u2060joiner", "filler\u3164", "\u115f", "\U000e0041tag"),
]
ACCEPTED_PACKAGES = ["a", "dist", "MyPackage", "Zeta", "muon2", "_private", "match", "torch_model", "x" * 64, LONG]
ACCEPTED_TEXTS = [
    "Jane O'Brien",
    "数学",
    "שלום",
    "محمد علی",
    "می‌خواهم",
    "🚀 👩‍💻",
    "Füße",
    "a" * 300,
    "…",
    "#!",
]


@pytest.mark.parametrize(("prompt", "names"), [("package_name", REFUSED_PACKAGES), ("project_slug", REFUSED_SLUGS)])
def test_names_that_cannot_work_are_refused(hook: ModuleType, prompt: str, names: list[str]) -> None:
    for name in names:
        # With a package that works, because the name of the folder is also its default.
        others = {"package_name": "fine"} if prompt == "project_slug" else {}
        said = complaints(hook, **{prompt: name}, **others)
        assert len(said) == 1, (name, said)
        assert said[0].startswith(f"{prompt}: ")
        assert said[0].isprintable(), name


@pytest.mark.parametrize("prompt", ["project_name", "author", "description"])
def test_texts_with_characters_that_nobody_sees_are_refused(hook: ModuleType, prompt: str) -> None:
    for text in UNSEEN:
        (said,) = complaints(hook, **{prompt: text}, project_slug="fine")
        assert said.startswith(f"{prompt}: it contains "), text
        assert said.isprintable()


def test_the_table_is_long_enough() -> None:
    assert len(REFUSED_PACKAGES) + len(REFUSED_SLUGS) + len(UNSEEN) >= 120
    assert len(set(REFUSED_PACKAGES)) == len(REFUSED_PACKAGES)


def test_names_that_work_are_taken(hook: ModuleType) -> None:
    for name in ACCEPTED_PACKAGES:
        assert complaints(hook, package_name=name) == []
    for text in ACCEPTED_TEXTS:
        assert complaints(hook, project_name=text, author=text, description=text, project_slug="fine") == []


def test_the_default_names_follow_from_a_long_project_name(hook: ModuleType) -> None:
    assert complaints(hook, project_name="A Very Long Name " * 20) == []


def installed_with(requirements: list[str]) -> set[str]:
    """The distributions, in this environment, that requirements install, with all that these need."""
    found: set[tuple[str, tuple[str, ...]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        key = requirement.name, tuple(sorted(requirement.extras))
        if key in found:
            continue
        found.add(key)
        try:
            further = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        for needed in map(Requirement, further):
            extras = ["", *requirement.extras]
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return {re.sub(r"[-_.]+", "-", name).lower() for name, _ in found}


def test_all_that_a_project_installs_is_refused(hook: ModuleType, baked_project: Path) -> None:
    project = tomllib.loads((baked_project / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    installed = installed_with([*project["dependencies"], *optional["report"], *optional["dev"]])
    assert installed - hook.TAKEN_DISTRIBUTIONS == set()
    imports = {
        name.lower()
        for name, owners in metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in installed for owner in owners) and name.isidentifier()
    }
    # A name with an underscore first is nobody's choice.
    assert {name for name in imports if not name.startswith("_")} - hook.TAKEN_PACKAGES == {"yaml-stubs"} & imports


def rendered(answers: dict[str, str], folder: Path) -> None:
    """Write the files of the skeleton in which a name stands, as cookiecutter would."""
    context = generate_context(str(TEMPLATE / "cookiecutter.json"), extra_context=answers)
    names = {"cookiecutter": prompt_for_config(context, no_input=True)}
    skeleton = FileSystemLoader(SKELETON)
    environment = Environment(loader=skeleton, undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    for file in python_files():
        path = folder / environment.from_string(str(file.relative_to(SKELETON))).render(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(environment.from_string(file.read_text()).render(names))


def python_files() -> Iterator[Path]:
    yield SKELETON / "pyproject.toml"
    for pattern in ("tests/*.py", "src/{*/*.py", "tasks/*/src/*.py"):
        files = list(SKELETON.glob(pattern))
        assert files, pattern
        yield from files


def test_the_style_holds_whatever_the_name(tmp_path: Path) -> None:
    texts = [*ACCEPTED_TEXTS, "lower case", "Returns:", "x " * 99, "数" * 99]
    packages = [{"package_name": name} for name in ACCEPTED_PACKAGES]
    for number, answers in enumerate([*packages, *({"project_name": text, "project_slug": "odd"} for text in texts)]):
        rendered(answers, tmp_path / str(number))  # each with its own settings of ruff
    for command in (["check"], ["format", "--check"]):
        call = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = subprocess.run(call, cwd=tmp_path, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_git_keeps_a_package_of_any_name(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text((SKELETON / ".gitignore").read_text())
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True, capture_output=True)
    for name in [*ACCEPTED_PACKAGES, "build", "data"]:
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "model.py").touch()
    files = [f"src/{name}/model.py" for name in [*ACCEPTED_PACKAGES, "build", "data"]]
    assert subprocess.run([*git, "check-ignore", *files], capture_output=True, check=False).returncode == 1
    assert subprocess.run([*git, "check-ignore", "build/x", "dist/x", "logs/x"], check=False).returncode == 0


@pytest.mark.parametrize("slug", ["a/b/c", "../up", "x" * 300])
def test_a_path_for_a_name_leaves_nothing_behind(bake: Bake, tmp_path: Path, slug: str) -> None:
    outputs = tmp_path / "here" / "outputs"
    outputs.mkdir(parents=True)
    finished = bake(TEMPLATE.parent, "--output-dir", str(outputs), project_slug=slug, package_name="fine")
    assert finished.returncode == 1
    assert finished.stderr.startswith("project_slug: ")
    assert "Traceback" not in finished.stderr
    assert list(outputs.parent.rglob("*")) == [outputs]
