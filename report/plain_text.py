"""Text that is not ours, such as names of runs and layers: safe to print, and plain in Markdown."""

import re
import unicodedata

# Control characters, marks that turn the direction of writing and other invisible ones, lone surrogates, line breaks.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # parts of emoji, and of the writing of several languages

_INLINE = re.compile(r"[\\|*`\[]|(?<!\w)_|_(?!\w)")  # inside of a word an underscore means itself
_AT_THE_START = re.compile(r"^(\s*(?:\d+(?=[.)]))?)([#>+.)-])")  # a heading, a quotation, an entry of a list
_ESCAPED = re.compile(r"\\([\\|*_`\[#>+.)-])")


def printable(text: str) -> str:
    r"""Return a text in which characters that a terminal obeys, or nobody sees, are escapes such as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNPRINTABLE and char not in _JOINERS
        else char
        for char in text
    )


def markdown(text: str) -> str:
    """Return Markdown that shows a text as it is, in one line, also in a table."""
    escaped = _INLINE.sub(r"\\\g<0>", printable(text)).replace("&", "&amp;").replace("<", "&lt;")
    return _AT_THE_START.sub(r"\1\\\2", escaped)


def from_markdown(text: str) -> str:
    """Return the text that :func:`markdown` escaped."""
    return _ESCAPED.sub(r"\1", text).replace("&lt;", "<").replace("&amp;", "&")


def code(text: str) -> str:
    """Return a text as code in Markdown, in one line."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def code_block(text: str, language: str) -> str:
    """Return a text of several lines as a block of code in Markdown."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = "\n".join(map(printable, text.rstrip().split("\n")))
    return f"{fence}{language}\n{lines}\n{fence}"


def table_row(*cells: str) -> str:
    """Return a line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def figure_text(text: str) -> str:
    """Return a text that matplotlib shows as it is: between two dollar signs would be mathematics."""
    return printable(text).replace("$", r"\$")
