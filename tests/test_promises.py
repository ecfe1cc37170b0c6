"""The tests that the pages "What is promised" and "Every published Muon bug" name are there, and run."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMED = re.compile(r"`(tests/\S+\.py)::(\w+)`")


def table_rows(page: str) -> list[str]:
    """Return the rows of all tables of a page, without their heads."""
    rows = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| ")]
    return [row for row in rows if not row.startswith(("| promise", "| what went wrong", "| ---"))]


def assert_it_runs(path: str, name: str) -> None:
    """It is a test that is not among the slow ones, or a check of a file that a test beside it runs."""
    file = ROOT / path
    functions = {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{path} has no {name}"
    assert not [mark for mark in functions[name].decorator_list if ast.unparse(mark).endswith("mark.slow")], name
    if name.startswith("check_"):
        beside = [test.read_text() for test in file.parent.glob("test_*.py")]
        assert any(f'"{file.name}"' in text and '"check_*"' in text for text in beside), f"nothing runs {path}"
    else:
        assert name.startswith("test_"), name
        assert file.name.startswith("test_"), path


def test_each_promise_has_its_test() -> None:
    promises = table_rows("what-is-promised.md")
    assert len(promises) > 15
    for row in promises:
        if row.endswith("| the same |"):
            continue
        named = NAMED.findall(row)
        assert len(named) == 1, row
        assert_it_runs(*named[0])


def test_each_published_bug_has_its_source_and_its_test() -> None:
    bugs = table_rows("every-published-muon-bug.md")
    assert len(bugs) > 30
    for row in bugs:
        wrong, where, why, tests = row.removeprefix("| ").removesuffix(" |").split(" | ")
        assert wrong, row
        assert why, row
        assert re.search(
            r"\]\(https://github\.com/[\w.-]+/[\w.-]+/(issues/\d+|pull/\d+|blob/[0-9a-f]{40}/\S+)\)", where
        ), row
        assert NAMED.findall(tests), row
        for path, name in NAMED.findall(tests):
            assert_it_runs(path, name)
