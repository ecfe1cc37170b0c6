"""The tables of the docs have the numbers of the records, and the entries of the table of quantities."""

import json
from pathlib import Path

import pytest

from benchmarks.tables import DOCS, filled
from lightning_muon.report import QUANTITIES, Quantity

PAGE = """Before.
<!-- table: speed-cpu | where: precision=float32 | columns: method; ms -->
old
<!-- end of table -->
After.
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with one record."""
    rows = [
        {"method": "fast", "precision": "float32", "ms": 1.23456},
        {"method": "slow", "precision": "float32", "ms": 12345.6},
        {"method": "slow", "precision": "float64", "ms": 2.0},
    ]
    machine = {"cpu": "A CPU", "cores": 4, "threads": 2, "gpu": None, "torch": "2.13.0"}
    record = {"date": "2026-01-02", "machine": machine, "rows": rows}
    (tmp_path / "speed-cpu.json").write_text(json.dumps(record))
    return tmp_path


def test_a_table_is_replaced_by_the_record(results: Path) -> None:
    after = filled(PAGE, results)
    assert "| method | ms |\n| --- | ---: |\n| fast | 1.23 |\n| slow | 1.23e+04 |\n" in after
    assert "`python -m benchmarks.speed`, 2026-01-02, A CPU, 4 cores, 2 threads, torch 2.13.0" in after
    assert "old" not in after
    assert after.startswith("Before.\n")
    assert after.endswith("\nAfter.\n")
    assert filled(after, results) == after


def test_what_is_missing_is_named(results: Path) -> None:
    with pytest.raises(ValueError, match=r"pace-cpu\.json is missing: run python -m benchmarks\.pace"):
        filled(PAGE.replace("speed", "pace"), results)
    with pytest.raises(ValueError, match=r"run python -m benchmarks\.embedded_text\.schedules"):
        filled(PAGE.replace("speed", "schedules"), results)
    with pytest.raises(ValueError, match=r"no row with .*float32.* has a column 'seconds'"):
        filled(PAGE.replace("; ms", "; seconds"), results)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_docs_hold_what_was_measured(page: Path) -> None:
    assert page.read_text() == filled(page.read_text()), "run: python -m benchmarks.tables"


@pytest.mark.parametrize("entry", QUANTITIES, ids=lambda entry: entry.tag)
def test_every_quantity_is_in_the_docs(entry: Quantity) -> None:
    """With the test above: as its entry says it."""
    assert (DOCS / "reading-the-monitors.md").read_text().count(f"\n| `watch/{entry.tag}` |") == 1
