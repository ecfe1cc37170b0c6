"""The map of the documentation has every page, and its reference every public name. ``make docs`` checks the links."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.test_rooms import ROOMS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MAP = (DOCS / "index.md").read_text()


def public_names(room: str) -> list[str]:
    """Return what a room has in ``__all__``, without importing it."""
    for node in ast.parse((ROOT / room / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{room} has no __all__")


def test_every_page_is_in_the_map_once() -> None:
    pages = {str(path.relative_to(DOCS)) for suffix in ("md", "rst") for path in DOCS.rglob(f"*.{suffix}")}
    # A list item with a link at its start, below a heading: conf.py makes the navigation of these.
    entries = re.findall(r"^- \[[^\]]+\]\(([^)#]+)\): .", MAP.partition("\n## ")[2], re.MULTILINE)
    assert Counter(entries) == Counter(pages - {"index.md"})


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_every_public_name_once(room: str) -> None:
    page = (DOCS / "reference" / f"{room}.rst").read_text()
    assert f".. automodule:: lightning_muon.{room}\n" in page
    entries = re.findall(r"^\.\. (?:auto|py:)(?:class|data|exception|function):: (\w+)$", page, re.MULTILINE)
    assert Counter(entries) == Counter(public_names(room))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)", text, re.MULTILINE)
    }


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_from_outside_of_the_site(name: str) -> None:
    for target, anchor in re.findall(r"\]\(((?!http)[^)#\s]+)(?:#([^)]+))?\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target
        assert not anchor or anchor in anchors(ROOT / target), (target, anchor)


def test_no_page_needs_more_than_github_has() -> None:
    """Directives would show as code there, or as colons."""
    for path in DOCS.glob("*.md"):
        assert not re.search(r"^```\{|^:::|^!!! ", path.read_text(), re.MULTILINE), path.name
