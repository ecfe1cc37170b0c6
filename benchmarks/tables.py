"""Fill the tables of the docs from the JSON records: ``python -m benchmarks.tables``.

A table is between two comments. The first comment selects its record, rows and columns::

    <!-- table: orthogonalization-cpu | where: precision=float32 shape=768×3072 | columns: method; ms -->
    <!-- end of table -->
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, shown

DOCS = Path(__file__).parents[1] / "docs"
TABLE = re.compile(
    r"(?P<head><!-- table: (?P<record>\S+)(?: \| where: (?P<where>[^|]*?))? \| columns: (?P<columns>.*?) -->\n)"
    r".*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def filled(text: str, results: Path = RESULTS) -> str:
    """Return a text with all tables filled from the records of a folder.

    Raises:
        ValueError: If a record, or a row or column of it, is missing.
    """
    return TABLE.sub(lambda match: f"{match['head']}{_table(match, results)}{match['end']}", text)


def _table(match: re.Match[str], results: Path) -> str:
    path = results / f"{match['record']}.json"
    module = match["record"].partition("-")[0]
    if not path.exists():
        raise ValueError(f"{path} is missing: run python -m benchmarks.{module}")
    record = json.loads(path.read_text())
    wanted = dict(pair.split("=") for pair in (match["where"] or "").split())
    rows = [row for row in record["rows"] if all(shown(row.get(key)) == value for key, value in wanted.items())]
    columns = [column.strip() for column in match["columns"].split(";")]
    for column in columns:
        if not any(column in row for row in rows):
            raise ValueError(f"{path}: no row{f' with {wanted}' if wanted else ''} has a column {column!r}")
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[shown(row.get(column)) for column in columns] for row in rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n<sub>`python -m benchmarks.{module}`, {record['date']}, {_machine(record['machine'])}</sub>\n"


def _machine(machine: dict[str, Any]) -> str:
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
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
