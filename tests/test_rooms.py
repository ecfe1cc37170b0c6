"""The rooms of the repository: which may import which, that no imports make a circle, and the size of files.

Imports are read from the syntax trees; nothing is imported. Those inside functions count too: a circle that is closed
at run time is still a circle.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]
MAX_LINES = 400
ROOT = "lightning_muon"

# What the modules of a room may import from other rooms: whole rooms, or single modules of them.
ROOMS: dict[str, tuple[str, ...]] = {
    "report": (),
    "optim": (),
    "callbacks": (
        "report.quantities",
        "report.charts",  # which charts the page has
        "report.health",  # how a run is judged, while it goes on as when it is over
        "report.orthogonality_map",
        "report.picture",
        "report.quantity",
        "report.replaced",
        "report.run_log",
        "report.verdict",
        "report.tags",  # under which names that is logged
        "report.plain_text",  # names that are not ours, in Markdown and on the terminal
        # Facts that the callbacks share with the optimizer, whatever the optimizer:
        "optim.routing.repeated",  # which modules are the blocks of a model
        "optim.routing.wrapped_names",  # names of parameters without the prefixes of wrappers
        "optim.polar.needed_steps",  # how many steps a method needs
        "optim.update.matrix_layout",  # where the matrices of a parameter are
        "optim.update.options",  # which options of a group its algorithm has
        "optim.update.state",  # which dtypes are half precision
        "optim.sharding.dtensor",  # what a shard is under FSDP2
        "optim.sharding.wrappers",  # what a shard is under FSDP1
    ),
    "strategies": (
        "optim.routing.repeated",  # which modules are the blocks of a model
        "optim.routing.wrapped_names",  # names of parameters without the prefixes of wrappers
        "optim.saved_groups",  # which group of a checkpoint a parameter was in
    ),
    "data": (),
    "experiments": ("report",),
    "cli": ("callbacks", "data", "experiments", "optim", "report", "strategies"),
}
# Distributions that a room must work without.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "report": ("torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning"),
    "experiments": ("torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning"),
    "optim": ("lightning", "lightning_fabric", "pytorch_lightning"),
}
# What the packages inside `optim` may import of `optim`, beside themselves. Its top files may import all of them.
OPTIM: dict[str, tuple[str, ...]] = {
    "polar": (),
    "update": ("polar",),
    "sharding": ("polar", "update"),
    "routing": ("polar", "update", "sharding"),
}


@dataclass(frozen=True)
class Module:
    """A file of a room: its name without ``lightning_muon.``, such as ``optim.polar.svd``; a package's is its own."""

    name: str
    file: Path
    tree: ast.Module


@dataclass(frozen=True)
class Import:
    """``module`` imports ``target``: a module of a room, named as in :class:`Module`, or a foreign one.

    ``typing_only`` imports are those under ``if TYPE_CHECKING``. They count where a package exports lazily, by
    ``__getattr__``, because they then say what is imported on first use.
    """

    module: Module
    target: str
    line: int
    foreign: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.module.file}:{self.line} imports {self.target if self.foreign else f'{ROOT}.{self.target}'}"


def read_modules(rooms: Mapping[str, Path]) -> dict[str, Module]:
    """Return the modules of rooms, given the folder of each."""
    modules = {}
    for room, folder in rooms.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join([room, *(part for part in parts if part != "__init__")])
            modules[name] = Module(name, file, ast.parse(file.read_text(encoding="utf-8")))
    return modules


def read_imports(modules: Mapping[str, Module]) -> list[Import]:
    """Return all imports, those inside functions included."""
    found = []
    for module in modules.values():
        functions = {node.name for node in module.tree.body if isinstance(node, ast.FunctionDef)}
        for node, for_typing in import_statements(module.tree):
            for target in targets(node, module, modules):
                ours = target.split(".")[0] == ROOT
                name = target.removeprefix(f"{ROOT}.")
                found.append(Import(module, name, node.lineno, not ours, for_typing and "__getattr__" not in functions))
    return found


def import_statements(node: ast.AST, for_typing: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield each import below a node, and whether it is under ``if TYPE_CHECKING``."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, for_typing
    else:
        guards = isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from import_statements(child, for_typing or (guards and field == "body"))


def targets(node: ast.Import | ast.ImportFrom, module: Module, modules: Mapping[str, Module]) -> list[str]:
    """Return what a statement imports: of ``from a import b`` it is a.b if that is a module, else a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = f"{ROOT}.{module.name}".split(".")
        steps = node.level - (module.file.name == "__init__.py")
        base = ".".join([*package[: len(package) - steps], *([base] if base else [])])
    names = [f"{base}.{alias.name}" for alias in node.names]
    found = [name if base == ROOT or name.removeprefix(f"{ROOT}.") in modules else base for name in names]
    return list(dict.fromkeys(found))


def is_inside(name: str, packages: tuple[str, ...]) -> bool:
    """Return whether a module is one of the packages, or below one."""
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def wrong_arrows(imports: list[Import]) -> list[str]:
    """Return the imports that go from a room to one that does not stand below it, or to nowhere."""
    problems = []
    for one in imports:
        room = one.module.name.split(".")[0]
        if one.foreign:
            if is_inside(one.target, FORBIDDEN.get(room, ())):
                problems.append(f"{one}, and {room} must work without it")
        elif not is_inside(one.target, (room, *ROOMS.get(room, ()))):
            problems.append(f"{one}, and {room} may import {', '.join(ROOMS.get(room, ())) or 'no other room'}")
    return problems


def wrong_arrows_in_optim(imports: list[Import]) -> list[str]:
    """Return the imports that go up inside ``optim``, to a higher package or to one of its top files."""
    problems = []
    for one in imports:
        room, *path = one.module.name.split(".")
        package = path[0] if path else ""
        is_below = room == "optim" and (package in OPTIM or len(path) > 1)
        if is_below and not one.foreign and is_inside(one.target, ("optim",)):
            may = (package, *OPTIM.get(package, ()))
            if not is_inside(one.target, tuple(f"optim.{name}" for name in may)):
                problems.append(f"{one}, and optim.{package} may import of optim only {', '.join(may)}")
    return problems


def missing_targets(imports: list[Import], modules: Mapping[str, Module]) -> list[str]:
    """Return the imports of modules of the rooms that do not exist."""
    return [f"{one}, which does not exist" for one in imports if not one.foreign and one.target not in modules]


def circle(imports: list[Import]) -> list[str]:
    """Return the imports of a circle among the modules of the rooms, in order; nothing if there is none."""
    edges = {(one.module.name, one.target): one for one in reversed(imports) if not one.foreign and not one.typing_only}
    graph: dict[str, set[str]] = {}
    for importer, target in edges:
        graph.setdefault(importer, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        names: list[str] = error.args[1]  # each is imported by the next one
        return [str(edges[importer, target]) for target, importer in pairwise(names)][::-1]
    return []


def wrong_files(rooms: Mapping[str, Path], modules: Mapping[str, Module], packages: list[str]) -> list[str]:
    """Return the files that are too long, have no docstring as a package, or are not in a package that is listed."""
    problems = []
    for module in modules.values():
        lines = len(module.file.read_text(encoding="utf-8").splitlines())
        is_package = module.file.name == "__init__.py"
        package = f"{ROOT}.{module.name if is_package else module.name.rpartition('.')[0]}"
        if lines > MAX_LINES:
            problems.append(f"{module.file} has {lines} lines, more than {MAX_LINES}")
        if is_package and not ast.get_docstring(module.tree):
            problems.append(f"{module.file} has no docstring to say what is inside")
        if package not in packages:
            problems.append(f"{module.file} is in {package}, which pyproject.toml does not list")
        if not all(part.isidentifier() for part in module.name.split(".")):
            problems.append(f"{module.file} cannot be imported by its name")
    for package in packages:
        if package.removeprefix(f"{ROOT}.") not in modules:
            problems.append(f"pyproject.toml lists {package}, which has no __init__.py")
    for room, folder in rooms.items():
        if room not in ROOMS:
            problems.append(f"{folder} is a room that has no arrows in {Path(__file__).name}")
    for name, module in modules.items():
        room, *path = name.split(".")
        if room == "optim" and len(path) == 1 and module.file.name == "__init__.py" and path[0] not in OPTIM:
            problems.append(f"{module.file.parent} is a package of optim that has no arrows in {Path(__file__).name}")
    return problems


@pytest.fixture(scope="module")
def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    return table["tool"]["setuptools"]


@pytest.fixture(scope="module")
def rooms(setuptools_table: dict[str, Any]) -> dict[str, Path]:
    folders: dict[str, str] = setuptools_table["package-dir"]
    # The presets in configs/ are packaged too, but they are no code.
    return {
        name.removeprefix(f"{ROOT}."): REPOSITORY / folder for name, folder in folders.items() if folder != "configs"
    }


@pytest.fixture(scope="module")
def modules(rooms: dict[str, Path]) -> dict[str, Module]:
    return read_modules(rooms)


@pytest.fixture(scope="module")
def imports(modules: dict[str, Module]) -> list[Import]:
    return read_imports(modules)


def assert_none(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems).replace(f"{REPOSITORY}/", ""), pytrace=False)


def test_rooms_import_only_what_stands_below_them(imports: list[Import]) -> None:
    assert_none(wrong_arrows(imports))


def test_arrows_inside_optim_point_down(imports: list[Import]) -> None:
    assert_none(wrong_arrows_in_optim(imports))


def test_imports_make_no_circle(imports: list[Import]) -> None:
    assert_none(circle(imports))


def test_imported_modules_exist(imports: list[Import], modules: dict[str, Module]) -> None:
    assert_none(missing_targets(imports, modules))


def test_files_are_short_documented_and_packaged(
    rooms: dict[str, Path], modules: dict[str, Module], setuptools_table: dict[str, Any]
) -> None:
    packages = [package for package in setuptools_table["packages"] if package != f"{ROOT}.configs"]
    assert_none(wrong_files(rooms, modules, packages))


# ---- the checks themselves, on small trees


def tree(folder: Path, sources: dict[str, str]) -> tuple[dict[str, Path], dict[str, Module]]:
    """Write files, such as ``{"optim/polar/svd.py": "import torch"}``, and what makes their folders packages."""
    for path, source in sources.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        for parent in file.relative_to(folder).parents[:-1]:
            if not (folder / parent / "__init__.py").exists():
                (folder / parent / "__init__.py").write_text('"""A package."""')
    rooms = {entry.name: entry for entry in folder.iterdir()}
    return rooms, read_modules(rooms)


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("report/runs.py", "import json\nfrom lightning_muon.report import render", ""),
        ("report/runs.py", "\nimport torch.nn", "runs.py:2 imports torch.nn, and report must work without it"),
        ("report/runs.py", "from lightning.pytorch import Trainer", "runs.py:1 imports lightning.pytorch, and report"),
        (
            "report/runs.py",
            "from lightning_muon import optim",
            "runs.py:1 imports lightning_muon.optim, and report may",
        ),
        ("optim/step.py", "import torch\nimport lightning_utilities", ""),
        (
            "optim/step.py",
            "def f():\n  import lightning",
            "step.py:2 imports lightning, and optim must work without it",
        ),
        ("optim/step.py", "from ..callbacks import a", "step.py:1 imports lightning_muon.callbacks, and optim may"),
        ("callbacks/a.py", "from lightning_muon.report.quantities import QUANTITIES", ""),
        ("callbacks/a.py", "from lightning_muon.report import QUANTITIES", "a.py:1 imports lightning_muon.report, and"),
        ("callbacks/a.py", "from lightning_muon.optim.update.matrix_layout import MatrixLayout", ""),
        ("callbacks/a.py", "from lightning_muon.optim import MuonAdamW", "a.py:1 imports lightning_muon.optim, and"),
        ("callbacks/a.py", "import lightning_muon.optim.muon_adamw", "a.py:1 imports lightning_muon.optim.muon_adamw"),
        ("strategies/a.py", "from lightning_muon.strategies.blocks import find_blocks", ""),
        ("strategies/a.py", "from lightning_muon.cli import main", "a.py:1 imports lightning_muon.cli, and strategies"),
        ("strategies/a.py", "try:\n  import lightning_muon.optim\nfinally:\n  pass", "a.py:2 imports lightning_muon."),
        ("cli/main.py", "from lightning_muon.callbacks import a\nimport lightning_muon.optim.anything", ""),
    ],
)
def test_a_wrong_arrow_is_found(file: str, source: str, wrong: str, tmp_path: Path) -> None:
    _, modules = tree(tmp_path, {file: source})
    problems = wrong_arrows(read_imports(modules))
    assert len(problems) == bool(wrong)
    assert wrong in "".join(problems)


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("polar/svd.py", "from lightning_muon.optim.polar.quintics import Quintic", ""),
        ("polar/svd.py", "from . import quintics\nfrom .quintics import Quintic", ""),
        ("polar/svd.py", "from lightning_muon.optim.update import scale", "optim.polar may import of optim only polar"),
        ("polar/svd.py", "from ..update.scale import f", "svd.py:1 imports lightning_muon.optim.update.scale, and"),
        ("update/muon.py", "from lightning_muon.optim.polar import svd", ""),
        ("update/muon.py", "from lightning_muon.optim.sharding import plan", "optim.update may import of optim only"),
        ("sharding/plan.py", "def f():\n  from lightning_muon.optim.parameter_group import named", "plan.py:2 imports"),
        (
            "sharding/plan.py",
            "from lightning_muon.optim.routing import roles",
            "optim.sharding may import of optim only",
        ),
        ("routing/roles.py", "from lightning_muon.optim.sharding.plan import Plan", ""),
        (
            "routing/roles.py",
            "from lightning_muon.optim import MuonAdamW",
            "roles.py:1 imports lightning_muon.optim, and",
        ),
        ("muon_adamw.py", "from lightning_muon.optim import state_dict\nimport lightning_muon.optim.routing", ""),
        ("new/idea.py", "from lightning_muon.optim.polar import svd", "optim.new may import of optim only new"),
    ],
)
def test_a_wrong_arrow_inside_optim_is_found(file: str, source: str, wrong: str, tmp_path: Path) -> None:
    others = {"optim/state_dict.py": "", "optim/polar/quintics.py": "", "optim/update/scale.py": ""}
    _, modules = tree(tmp_path, {**others, f"optim/{file}": source})
    problems = wrong_arrows_in_optim(read_imports(modules))
    assert len(problems) == bool(wrong)
    assert wrong in "".join(problems)


def test_a_circle_is_found_wherever_it_is_closed(tmp_path: Path) -> None:
    sources = {"cli/a.py": "import lightning_muon.cli.b", "cli/b.py": "\nfrom . import c", "cli/c.py": ""}
    _, modules = tree(tmp_path, sources)
    assert not circle(read_imports(modules))
    _, modules = tree(tmp_path, {"cli/c.py": "\ndef f():\n  from lightning_muon.cli.a import g"})
    steps = [f"{tmp_path}/cli/{step}" for step in ("a.py:1 imports {}.b", "b.py:2 imports {}.c", "c.py:3 imports {}.a")]
    expected = [step.format("lightning_muon.cli") for step in steps]
    found = circle(read_imports(modules))
    start = found.index(expected[0])
    assert found[start:] + found[:start] == expected


def test_imports_for_typing_make_no_circle_unless_they_are_exported_lazily(tmp_path: Path) -> None:
    for_typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from lightning_muon.cli.a import f\n"
    _, modules = tree(tmp_path, {"cli/a.py": "from lightning_muon.cli import f", "cli/__init__.py": for_typing})
    assert not circle(read_imports(modules))
    _, modules = tree(tmp_path, {"cli/__init__.py": f"{for_typing}\ndef __getattr__(name):\n  return None"})
    assert len(circle(read_imports(modules))) == 2


def test_an_import_of_what_does_not_exist_is_found(tmp_path: Path) -> None:
    source = "from lightning_muon.cli import b\ndef f():\n  from lightning_muon.cli.c import d"
    _, modules = tree(tmp_path, {"cli/a.py": source})
    (problem,) = missing_targets(read_imports(modules), modules)
    assert problem == f"{tmp_path}/cli/a.py:3 imports lightning_muon.cli.c, which does not exist"


def test_files_of_the_wrong_form_are_found(tmp_path: Path) -> None:
    sources = {
        "cli/long.py": "x = 1\n" * (MAX_LINES + 1),
        "cli/short.py": "x = 1\n" * MAX_LINES,
        "cli/two words.py": "",
        "den/file.py": "",
        "optim/__init__.py": "x = 1",
        "optim/new/idea.py": "",
    }
    rooms, modules = tree(tmp_path, sources)
    problems = wrong_files(rooms, modules, [f"lightning_muon.{name}" for name in ("cli", "den", "gone", "optim")])
    expected = [
        "cli/long.py has 401 lines",
        "cli/two words.py cannot be imported",
        "den is a room that has no arrows",
        "optim/__init__.py has no docstring",
        "optim/new is a package of optim that has no arrows",
        "optim/new/__init__.py is in lightning_muon.optim.new, which pyproject.toml does not list",
        "optim/new/idea.py is in lightning_muon.optim.new, which pyproject.toml does not list",
        "pyproject.toml lists lightning_muon.gone",
    ]
    found = sorted(problem.replace(f"{tmp_path}/", "") for problem in problems)
    assert [problem[: len(start)] for problem, start in zip(found, expected, strict=True)] == expected
