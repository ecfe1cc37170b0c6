"""The experiments on the embedded text, with ``--quick``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.embedded_text import comparison, precisions, schedules, transfer
from benchmarks.tables import filled

pytestmark = pytest.mark.slow  # a quarter of a minute each


@pytest.fixture
def record_of(tmp_path: Path) -> Callable[[Any], dict[str, Any]]:
    """Run an experiment in a folder, and return its record."""

    def run(experiment: Any) -> dict[str, Any]:
        places = [f"--{name}={tmp_path / name}" for name in ("folder", "results", "images")]
        experiment.main(["--quick", "--jobs=2", *places])
        (path,) = (tmp_path / "results").iterdir()
        record: dict[str, Any] = json.loads(path.read_text())
        assert record["runs"] > 0
        assert record["hours of training"] >= 0
        return record

    return run


def test_comparison(record_of: Callable[[Any], dict[str, Any]], tmp_path: Path) -> None:
    record = record_of(comparison)
    found = {line["name"]: line["runs"] for line in record["standings"]}  # the best first
    assert found.keys() == {"adamw", "moonlight"}
    assert found["adamw"] == 6  # three lengths, two seeds
    assert "TextModule on TextData" in record["sentence"]
    page = "<!-- table: comparison-1m-cpu | columns: optimizer; val/loss; steps; settings -->\n<!-- end of table -->\n"
    table = filled(page, tmp_path / "results").splitlines()
    assert [line.split(" | ")[0] for line in table[3:5]] == [f"| {name}" for name in found]
    assert table[-2].startswith("<sub>`python -m benchmarks.embedded_text.comparison --size 1m`, 20")
    assert [path.suffix for path in (tmp_path / "images").iterdir()] == [".png"]  # there was no tuning to draw


def test_transfer(record_of: Callable[[Any], dict[str, Any]], tmp_path: Path) -> None:
    rows = record_of(transfer)["rows"]
    assert [(row["optimizer"], row["width"]) for row in rows] == [
        (optimizer, width) for optimizer in transfer.OPTIMIZERS for width in transfer.WIDTHS[:2]
    ]
    for row in rows:
        assert row["loss"] == row["losses"][f"{row['best rate']:g}"] == min(row["losses"].values())
        assert row["loss more by its rate at the smallest width"] >= 0
    assert [path.suffix for path in (tmp_path / "images").iterdir()] == [".png"]


def test_precisions(record_of: Callable[[Any], dict[str, Any]]) -> None:
    rows = record_of(precisions)["rows"]
    assert [row["precision"] for row in rows] == [*precisions.PRECISIONS] * 2
    exact, mixed, half = rows[:3]
    assert exact["more than in float32"] == ""
    assert mixed["MB of state"] == exact["MB of state"] > half["MB of state"]
    assert half["val/loss"] != exact["val/loss"]


def test_schedules(record_of: Callable[[Any], dict[str, Any]]) -> None:
    rows = record_of(schedules)["rows"]
    assert [row["optimizer"] for row in rows] == [name for name in schedules.OPTIMIZERS for _ in schedules.SCHEDULES]
    for row in rows:
        assert (row["more than cosine"] == "") == (row["schedule"] == schedules.COSINE)
    assert len({row["val/loss"] for row in rows}) > 6  # the schedules were used
