"""Names that are not ours: safe to print, and plain in Markdown."""

import os
from pathlib import Path

import pytest
from markdown import markdown as html  # type: ignore[import-untyped]  # what TensorBoard shows texts by
from torch.utils.tensorboard import SummaryWriter

from lightning_muon.report import compare, print_comparison, write_report
from lightning_muon.report.plain_text import code, code_block, from_markdown, markdown, printable

EVIL = "\x1b[31m<b>*run*</b> [x](http://y) `z` \u202e"
TEXTS = [
    "net_1.weight",
    "_x_",
    "**bold**",
    "# title",
    "> said",
    "- one",
    "1. one",
    "a|b",
    "\\",
    "<script>",
    "`a`",
    "a_b_c",
]


def shown(text: str) -> str:
    """The text that a browser shows of Markdown."""
    import re
    from html import unescape

    page = html(text, extensions=["markdown.extensions.tables", "markdown.extensions.fenced_code"])
    return unescape(re.sub(r"<[^>]*>", "", page)).strip()


@pytest.mark.parametrize("text", TEXTS)
def test_markdown_shows_it_as_it_is(text: str) -> None:
    assert shown(markdown(text)) == text
    assert from_markdown(markdown(text)) == text
    assert shown(code(text)) == text


@pytest.mark.parametrize("text", ["a: 1", "```\n# out", "x ```` y"])
def test_nothing_leaves_a_block_of_code(text: str) -> None:
    assert shown(code_block(text, "yaml")) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb", "a\\nb"),
        ("\u202eabc", "\\u202eabc"),
        ("数学 👩‍💻 é", "数学 👩‍💻 é"),
        ("\x07", "\\x07"),
    ],
)
def test_what_a_terminal_obeys_is_shown(text: str, printed: str) -> None:
    assert printable(text) == printed


def test_the_name_and_the_warnings_of_a_run_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = EVIL.replace("/", "-")
    for folder in (name, "other $x$"):
        with SummaryWriter(os.fspath(tmp_path / folder)) as writer:
            writer.add_scalar("train/loss", 1.0, 1)
            writer.add_text("warnings", markdown("*net*.0 is \x1b[31mred <b>"), 1)
    comparison = compare([tmp_path], 5)
    print_comparison(comparison, figures=True)
    written, _ = write_report(comparison, tmp_path / "report")
    page = written[0].read_text()
    for text in (capsys.readouterr().out, page):
        assert "\x1b[31m" not in text
        assert "\u202e" not in text
    assert "*net*.0 is \\x1b[31mred <b>" in shown(page)
    assert printable(name) in shown(page)
