"""``python -m benchmarks.gpu`` in tiny form on the CPU, so that it is right the day a GPU is there."""

import json
import os
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import marked_tests, optimizer_steps, polar_factors
from benchmarks.gpu.goals import GOALS, reached
from benchmarks.gpu.measuring import Measuring, SkippedError
from benchmarks.gpu.processes import run_section
from benchmarks.gpu.subject import preset_names
from benchmarks.gpu.training import contestants
from benchmarks.orthogonalization import METHODS
from benchmarks.tables import filled
from tests.processes import REPOSITORY, run_module


@pytest.mark.slow  # a quarter of a minute, on a machine without a GPU
def test_all_sections_in_tiny_form(tmp_path: Path) -> None:
    """One test, since the run takes seconds: pytest-xdist would make a fixture once for each worker."""
    arguments = ["--device", "cpu", "--tiny", "--results", str(tmp_path)]
    run = run_module("benchmarks.gpu", *arguments, folder=tmp_path, path=[REPOSITORY])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "The record is" in run.stdout
    record: dict[str, Any] = json.loads((tmp_path / "gpu-cpu.json").read_text())
    check_sections(record)
    check_steps(record)
    check_training(record)
    check_memory(record)
    check_monitors(record)
    check_strategies(record)
    check_polar_factors(record)
    # The docs can show it.
    page = "<!-- table: gpu-cpu | where: section=memory | columns: what; state MB -->\n<!-- end of table -->\n"
    assert "| torch AdamW, fused | 0.204 |" in filled(page, tmp_path)


def rows_of(record: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """The rows of a section with something measured."""
    return {row["what"]: row for row in record["rows"] if row["section"] == section and "skipped" not in row}


def check_sections(record: dict[str, Any]) -> None:
    assert list(record["sections"]) == list(gpu.SECTIONS)
    assert {name: section["status"] for name, section in record["sections"].items()} == {
        **dict.fromkeys(gpu.SECTIONS, "ok"),
        "tests": "skipped: no CUDA",
    }
    assert {row["skipped"] for row in record["rows"] if "skipped" in row} == {
        "no CUDA",
        "no CUDA, which FSDPStrategy needs",
        "configs/optimizer/per_head.yaml sets more than model.optimizer",
        "configs/optimizer/roles.yaml sets more than model.optimizer",
    }
    assert record["machine"]["torch"] == torch.__version__
    assert record["settings"]["quick"]
    numbers = [value for row in record["rows"] for value in row.values() if isinstance(value, float)]
    assert all(map(isfinite, numbers))


def check_steps(record: dict[str, Any]) -> None:
    rows = rows_of(record, "step")
    expected = (
        {"MuonAdamW", "torch Muon + AdamW, fused", "torch AdamW, fused", *preset_names()}
        - optimizer_steps.ALIKE
        - optimizer_steps.OTHERS
        - {"per_head", "roles"}
    )
    assert expected <= set(rows)
    for name, row in rows.items():
        assert row["ms"] > 0, name
        assert row["times torch's speed"] > 0, name
        if "floor ms" in row:
            assert 0 < row["floor ms"] < row["ms"], name
            assert row["× floor"] == pytest.approx(row["ms"] / row["floor ms"])
    assert {"MuonAdamW", "fast", "torch Muon + AdamW, fused"} <= {
        name for name, row in rows.items() if "floor ms" in row
    }
    assert rows["fast"]["floor ms"] < rows["MuonAdamW"]["floor ms"]
    assert rows["MuonAdamW"]["state MB"] == pytest.approx(rows["torch Muon + AdamW, fused"]["state MB"])


def check_training(record: dict[str, Any]) -> None:
    rows = rows_of(record, "training")
    steps = {row["optimizer"]: row for row in rows.values() if "optimizer" in row}
    assert list(steps) == list(contestants())
    for row in steps.values():
        assert row["update ms"] > 0
        assert row["step ms"] > 0
        assert row["× AdamW's step"] > 0
    assert steps["torch AdamW, fused"]["× AdamW's step"] == 1.0


def check_memory(record: dict[str, Any]) -> None:
    rows = rows_of(record, "memory")
    assert list(rows) == list(contestants())
    # AdamW keeps two moments of each parameter, and a count of steps; Muon one moment of each matrix.
    adamw, muon = rows["torch AdamW, fused"], rows["MuonAdamW"]
    assert adamw["state MB"] == pytest.approx(2 * adamw["weights MB"], rel=0.01)
    assert 0.5 < muon["× AdamW's state"] < 0.6
    assert muon["× AdamW's state"] == muon["state MB"] / adamw["state MB"]


def check_monitors(record: dict[str, Any]) -> None:
    row = rows_of(record, "monitors")["cost"]
    assert row["step ms"] > 0
    low, high = map(float, row["95 % interval"].split(" … "))
    assert low <= row["% of the steps' time"] + 0.01
    assert high >= row["% of the steps' time"] - 0.01


def check_strategies(record: dict[str, Any]) -> None:
    rows = rows_of(record, "strategies")
    assert rows["fsdp2, 32-true"]["weights differ by"] <= 1e-6
    for name, row in rows.items():
        assert row["last loss"] < row["first loss"], name
        assert row["step ms"] > 0, name


def check_polar_factors(record: dict[str, Any]) -> None:
    rows = list(rows_of(record, "polar").values())
    assert {row["method"] for row in rows} == set(METHODS)
    assert {row["precision"] for row in rows} == set(polar_factors.PRECISIONS)
    for row in rows:
        assert min(row["floor ms"], row["ms"]) > 0, row["what"]  # the floor may be above where other programs run
        assert row["× floor"] == pytest.approx(row["ms"] / row["floor ms"])
        assert row["× newton_schulz"] > 0


def test_flops_of_factorizations() -> None:
    """QDWH on a square matrix: products, and the factorizations of each step."""
    m = 24

    def flops(precision: str, dtype: torch.dtype) -> float:
        matrix = torch.randn(m, m, dtype=dtype)
        return polar_factors.count_flops(
            lambda: polar_factors.run(matrix, precision, METHODS["qdwh"], False), polar_factors.FACTORIZATIONS
        )

    # The square, its factorization, the inverse, and the product with the matrix.
    by_cholesky = 2 * m**3 + m**3 // 3 + 2 * m**3 // 3 + 2 * m**3
    # 4·(2m)m² − 4m³/3, and the product of the parts of Q.
    by_qr = 4 * 2 * m * m**2 - 4 * m**3 // 3 + 2 * m**3
    assert flops("float32", torch.float32) == 4 * by_cholesky
    assert flops("float64", torch.float64) == 2 * by_qr + 4 * by_cholesky


def test_goals() -> None:
    rows = [{"section": goal.section, "what": goal.what, goal.column: goal.limit} for goal in GOALS]
    assert [row["reached"] for row in reached(rows)] == ["yes"] * len(GOALS)
    worse = [
        {**row, goal.column: goal.limit * 0.9 if goal.at_least else goal.limit + 1}
        for row, goal in zip(rows, GOALS, strict=True)
    ]
    assert [row["reached"] for row in reached(worse)] == ["no"] * len(GOALS)
    assert reached([{"section": "step", "what": "MuonAdamW", "skipped": "no time"}]) == []


def ends(measuring: Measuring) -> None:
    for name in measuring.each(["first", "second"]):
        with measuring.row(name) as row:
            row["ms"] = 1.0


def fails_once(measuring: Measuring) -> None:
    for name in measuring.each(["good", "bad", "unable", "last"]):
        with measuring.row(name) as row:
            if name == "bad":
                raise ZeroDivisionError("seven")
            if name == "unable":
                raise SkippedError("no such thing")
            row["ms"] = 1.0


def fails(measuring: Measuring) -> None:
    with measuring.row("good") as row:
        row["ms"] = 1.0
    raise ZeroDivisionError("eight")


def is_impossible(measuring: Measuring) -> None:
    measuring.needs_cuda()


def hangs(measuring: Measuring) -> None:
    with measuring.row("good") as row:
        row["ms"] = 1.0
    with measuring.row("endless"):
        time.sleep(100)


def dies(measuring: Measuring) -> None:
    with measuring.row("fatal"):
        os._exit(11)


@pytest.mark.parametrize(
    ("section", "seconds", "status", "measured"),
    [
        (ends, 10.0, "ok", ["first", "second"]),
        (ends, -1.0, "ok", []),
        (fails_once, 10.0, "failed: 1 of its measurements", ["good", "last"]),
        (fails, 10.0, "failed: the section", ["good"]),
        (is_impossible, 10.0, "skipped: no CUDA", []),
        (hangs, 0.5, "failed: killed in endless, 1 s after the section's time was over", ["good"]),
        (dies, 10.0, "failed: the process ended in fatal, with exit code 11", []),
    ],
)
def test_how_a_section_ends(
    section: Callable[[Measuring], None], seconds: float, status: str, measured: list[str], tmp_path: Path
) -> None:
    """In each case the record has what was measured before, at any time."""
    written = gpu.Record(tmp_path / "gpu-cpu.json", "cpu", {})
    written.begin("step")

    def read() -> dict[str, Any]:
        content: dict[str, Any] = json.loads(written.path.read_text())
        return content

    def receive(kind: str, found: dict[str, Any]) -> None:
        written.add("step", kind, found)
        assert read()["rows"] == written.rows
        assert read()["sections"]["step"]["status"] == "unfinished"

    deadline = time.time() + seconds
    written.end(
        "step",
        run_section(section, "cpu", True, deadline, deadline + 1 if seconds > 0 else time.time() + 10, receive),
        0.0,
    )
    content = read()
    assert content["sections"]["step"]["status"] == status
    assert [row["what"] for row in content["rows"] if "skipped" not in row] == measured
    assert written.has_failed() == status.startswith("failed")
    skipped = {row["what"]: row["skipped"] for row in content["rows"] if "skipped" in row}
    failures = content["sections"]["step"]["failures"]
    if seconds < 0:
        assert skipped == dict.fromkeys(["first", "second"], "the time of the section was over")
    if section is fails_once:
        assert skipped == {"unable": "no such thing"}
        assert failures[0]["what"] == "bad"
        assert "ZeroDivisionError: seven" in failures[0]["traceback"]
    if section is fails:
        assert "ZeroDivisionError: eight" in failures[0]["traceback"]
    assert list(tmp_path.iterdir()) == [written.path]


def test_marked_tests_are_reported_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"test_on_cuda.py", "test_cadence.py"} <= {path.name for path in marked_tests.marked_files()}
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n\n@pytest.mark.gpu\n@pytest.mark.parametrize('a', ['x y', 'z'])\ndef test_good(a): pass\n\n"
        "@pytest.mark.gpu\ndef test_bad(): assert 1 == 2\n\ndef test_other(): pass\n"
    )
    monkeypatch.setattr(marked_tests, "marked_files", lambda: [file])
    said: list[tuple[str, dict[str, Any]]] = []
    marked_tests.run_tests(Measuring(lambda kind, found: said.append((kind, found)), "cuda", False, time.time() + 60))
    assert [(kind, found["what"].partition("::")[2]) for kind, found in said if kind != "begin"][:3] == [
        ("row", "test_good[x y]"),
        ("row", "test_good[z]"),
        ("failure", "test_bad"),
    ]
    assert said[-1][1]["what"] == "exit code 1"
    assert "assert 1 == 2" in said[-1][1]["traceback"]


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--device", "cpu"]):
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert "--tiny" in capsys.readouterr().err
