"""The documentation site: ``make docs`` builds it with Sphinx, from these pages and the docstrings.

The pages are Markdown as GitHub shows it, without anything of Sphinx. ``index.md`` is the map: its headings and links
are the navigation of the site, in their order. ``reference/`` has a page for each room.
"""

import itertools
import re
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger

project = "lightning-muon"
html_title = "lightning-muon"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images"]

# Anchors as on GitHub, of headings of all levels that the pages have.
myst_heading_anchors = 4

# A docstring of Lightning says nothing of what a class here does with its hook.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# What is ours and is named in a docstring must be on a page. Names of other libraries have no page here, nothing is
# fetched; the modules and functions inside a room are no public names.
nitpicky = True
nitpick_ignore = [
    ("py:exc", "MisconfigurationException"),
    ("py:class", "LightningModule"),
    ("py:class", "LightningDataModule"),
    ("py:class", "Table"),
]
nitpick_ignore_regex = [
    (r"py:.*", r"(?!lightning_muon\.).*\..*"),
    (r"py:mod", r"lightning_muon\..*"),
    (r"py:.*", r"lightning_muon\.\w+\.[a-z_]\w*\..*"),
]

log = getLogger(__name__)
INSIDE_A_ROOM = re.compile(r"(?P<room>lightning_muon\.\w+)\.[a-z_][\w.]*\.(?P<name>[A-Z]\w*)")
INDEX_LINK = re.compile(r"^- \[(?P<title>[^\]]+)\]\((?P<page>[\w/-]+)\.(?:md|rst)\)", re.MULTILINE)


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Make the lists of links in index.md the navigation, with a section for each heading."""
    if name != "index":
        return
    sections = source[0].split("\n## ")[1:]
    for section in sections:
        entries = "\n".join(f"{link['title']} <{link['page']}>" for link in INDEX_LINK.finditer(section))
        caption = section.partition("\n")[0]
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n" if entries else ""


def is_left_out(app: Sphinx, what: str, name: str, value: object, skip: bool, options: object) -> bool:
    """Leave out the methods that torch and Lightning call: they are documented there."""
    return skip or getattr(getattr(value, "fget", value), "__override__", False)


def with_plain_defaults(
    app: Sphinx, what: str, name: str, value: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write the default of a dataclass field that a function makes as an ellipsis: Sphinx needs an expression."""
    return signature and re.sub(r"<[\w ]+>", "...", signature), returns


def leave_out_map(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Leave out what the docstring of a room says to those who work on it: which file has what."""
    if what == "module":
        lines[:] = itertools.takewhile(lambda line: not line.startswith("- "), lines)


def find_public(app: Sphinx, env: BuildEnvironment, node: nodes.Element, text: nodes.Element) -> nodes.Node | None:
    """Link a class that an annotation names by its module to its entry, which has the name that users import."""
    if found := INSIDE_A_ROOM.fullmatch(node.get("reftarget", "")):
        target = f"{found['room']}.{found['name']}"
        python = env.domains.python_domain
        return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, text)
    return None


def write_formula(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show by themselves: other renderers load a program from a server."""
    block = isinstance(node, nodes.math_block)
    formula = node.astext()
    if r"\\" in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    try:
        writer.body.append(latex2mathml.tex2mathml(formula, as_block=block))
    except (SyntaxError, ValueError) as error:
        log.warning("formula: %s", error, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", add_navigation)
    app.connect("autodoc-skip-member", is_left_out)
    app.connect("autodoc-process-signature", with_plain_defaults)
    app.connect("autodoc-process-docstring", leave_out_map)
    app.connect("missing-reference", find_public)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))


html_math_renderer = "mathml"
