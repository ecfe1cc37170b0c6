"""Fill the tables of the docs from the JSON records and from ``QUANTITIES``: ``python -m benchmarks.tables``.

A table is between two comments. The first comment selects its record, rows and columns, or a monitor::

    <!-- table: orthogonalization-cpu | where: precision=float32 shape=768×3072 | columns: method; ms -->
    <!-- end of table -->

    <!-- quantities: WeightRMSMonitor -->
    <!-- end of table -->
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, shown
from lightning_muon.report import QUANTITIES
from lightning_muon.report.tags import tag_of

DOCS = Path(__file__).parents[1] / "docs"
EMBEDDED_TEXT = Path(__file__).parent / "embedded_text"
TABLE = re.compile(
    r"(?P<head><!-- table: (?P<record>\S+)(?: \| where: (?P<where>[^|]*?))? \| columns: (?P<columns>.*?) -->\n)"
    r".*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)
QUANTITY_TABLE = re.compile(
    r"(?P<head><!-- quantities: (?P<monitor>\w+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)


def filled(text: str, results: Path = RESULTS) -> str:
    """Return a text with all tables filled, those of measurements from the records of a folder.

    Raises:
        ValueError: If a record, or a row or column of it, is missing, or a monitor logs no quantities.
    """
    text = QUANTITY_TABLE.sub(lambda match: f"{match['head']}{_quantity_table(match['monitor'])}{match['end']}", text)
    return TABLE.sub(lambda match: f"{match['head']}{_table(match, results)}{match['end']}", text)


def _table(match: re.Match[str], results: Path) -> str:
    path = results / f"{match['record']}.json"
    name = match["record"].partition("-")[0]
    package = "benchmarks.embedded_text" if (EMBEDDED_TEXT / f"{name}.py").exists() else "benchmarks"
    command = f"python -m {package}.{name}"
    if not path.exists():
        raise ValueError(f"{path} is missing: run {command}")
    record = json.loads(path.read_text())
    wanted = dict(pair.split("=") for pair in (match["where"] or "").split())
    rows = [row for row in record["rows"] if all(shown(row.get(key)) == value for key, value in wanted.items())]
    columns = [column.strip() for column in match["columns"].split(";")]
    for column in columns:
        if not any(column in row for row in rows):
            raise ValueError(f"{path}: no row{f' with {wanted}' if wanted else ''} has a column {column!r}")
    # Such as what was skipped, and warm-ups.
    rows = [row for row in rows if any(row.get(column) is not None for column in columns[1:])]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[shown(row.get(column)) for column in columns] for row in rows]
    table = _markdown(lines)
    return f"{table}\n<sub>`{record.get('command', command)}`, {record['date']}, {_machine(record['machine'])}</sub>\n"


def _quantity_table(monitor: str) -> str:
    entries = [entry for entry in QUANTITIES if entry.monitor == monitor]
    if not entries:
        raise ValueError(f"no entry of lightning_muon.report.QUANTITIES is of {monitor}")
    lines = [["tag", "what it is", "unit", "healthy", "if not"], ["---"] * 5]
    for entry in entries:
        healthy = "; ".join(filter(None, (entry.healthy.words, entry.usual)))
        if_not = re.sub(r"\w+_\w+|AutoWeightDecay", r"`\g<0>`", entry.if_not)
        lines.append([f"`{tag_of(entry.tag)}`", entry.meaning, entry.unit, healthy, if_not])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _machine(machine: dict[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {threads}"
    return f"{processor}, torch {machine['torch']}"


def main(arguments: list[str] | None = None) -> None:
    """Fill the tables of all pages in docs/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text()
        after = filled(before)
        if after != before:
            page.write_text(after)
            print(f"filled the tables of {page}")


if __name__ == "__main__":
    main()
