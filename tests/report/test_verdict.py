"""The verdict on a run: one scale for all quantities, since when it holds, and names old and new."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_muon.cli import main
from lightning_muon.report import QUANTITIES, Comparison, RunLog
from lightning_muon.report.quantity import WORST, Range
from lightning_muon.report.run_log import read_run
from lightning_muon.report.tags import name_of, tag_of
from lightning_muon.report.verdict import course, health_of
from tests.report.test_report import HEALTHY, write_events


def run_of(**curves: list[float]) -> RunLog:
    """A run that logged each 25 steps; ``__`` in a name stands for its slash."""
    logged = {
        name.replace("__", "/"): [(24 + 25 * place, value) for place, value in enumerate(values)]
        for name, values in curves.items()
    }
    return RunLog("run", Path("run"), logged, {})


@pytest.mark.parametrize(
    ("of", "value", "severity"),
    [
        (Range(bound=1.0, bad=4.0), 0.25, 0.25),  # the part of the limit
        (Range(bound=1.0, bad=4.0), 1.0, 1.0),
        (Range(bound=1.0, bad=4.0), 2.0, 1.5),  # halfway, on a scale of ratios
        (Range(bound=1.0, bad=4.0), 4.0, 2.0),
        (Range(bound=1.0, bad=4.0), 16.0, 3.0),
        (Range(bound=1.0, bad=4.0), 1e300, WORST),
        (Range(bound=1.0, bad=4.0), math.nan, WORST),
        (Range(bound=16, bad=4), 128, 0.125),  # the least healthy value
        (Range(bound=16, bad=4), 4, 2.0),
        (Range(bound=16, bad=4), 0, WORST),
        (Range(bound=-1, bad=-1), -1, 0.0),  # never
        (Range(bound=-1, bad=-1), 3, WORST),
        (Range(bound=0, bad=9), 0, 0.0),  # counts
        (Range(bound=0, bad=9), 9, 2.0),
        (Range(bound=0), 1, 1.5),  # never bad
        (Range(), 1, None),
    ],
)
def test_one_scale_for_all_ranges(of: Range, value: float, severity: float | None) -> None:
    assert of.severity(value) == (severity if severity is None else pytest.approx(severity))


@pytest.mark.parametrize("entry", [one for one in QUANTITIES if one.healthy.bound is not None], ids=lambda e: e.name)
def test_the_scale_says_what_the_verdict_says(entry: object) -> None:
    healthy: Range = entry.healthy  # type: ignore[attr-defined]
    assert healthy.bound is not None
    around = [healthy.bound, healthy.bad] if math.isfinite(healthy.bad) else [healthy.bound]
    for value in [one * factor + shift for one in around for factor in (0.5, 0.99, 1.01, 2) for shift in (0, -1, 1)]:
        severity, verdict = healthy.severity(value), healthy.judge(value)
        assert severity is not None
        assert {"ok": severity <= 1, "bad": severity > 2}.get(str(verdict), 1 <= severity <= 2), value


def test_since_when_and_what_to_do() -> None:
    health = health_of(run_of(weight_rms__max=[0.5, 5.0, 0.5, 2.0, 5.0, 6.0, 7.0]))
    assert health.verdict == "bad"
    assert health.since == 124  # the last time that it went bad; at step 99 it was `watch`
    assert health.headline.startswith(
        "bad since step 124: weight RMS, largest in the last quarter: 7 (healthy: under 1)"
    )
    assert "raise weight_decay" in health.unhealthy[0].line.advice


def test_a_warning_is_not_the_headline_where_a_quantity_says_what_is_wrong() -> None:
    run = replace(run_of(weight_rms__max=[1.2] * 5), texts={"warnings": [(30, "the weights are large")]})
    health = health_of(run)
    assert [one.name for one in health.unhealthy] == ["weight_rms", "warnings"]
    assert health.headline.startswith("watch since step 24: weight RMS")
    assert health.severity == max(health.severities().values()) == 1.5  # that of a warning


def test_the_verdict_is_that_of_the_report() -> None:
    for curves in (
        {"weight_rms__max": [0.2] * 5},
        {"weight_rms__max": [0.2, 0.3, 0.4, 1.5, 1.6]},
        {"output_rms__max": [1e5] * 5},
        {"val__loss": [1.0, 2.0, 3.0, math.nan]},
        {"weight_rms__max": [9.0]},
        {"val__loss": [1.0] * 5},
    ):
        run = run_of(**curves)
        assert health_of(run).verdict == Comparison.of([run]).verdict(0), curves


def test_sizes_may_grow_until_the_run_is_over() -> None:
    run = run_of(weight_rms__max=[0.1, 0.2, 0.3, 0.4, 0.5])
    assert health_of(run, is_over=False).verdict == "ok"
    assert health_of(run).verdict == "watch"


def test_the_course_is_how_it_was_judged_then() -> None:
    run = run_of(weight_rms__max=[0.5, 2.0, 4.0, 8.0])
    (line,) = [points for name, points in course(run, [24, 49, 74, 99]).items() if name == "weight_rms"]
    assert line == [(24, 0.5), (49, 1.5), (74, 2.0), (99, 2.5)]


def test_old_tags_are_read(tmp_path: Path) -> None:
    """Runs of before the namespace, and those that began before it."""
    old = {"weight_rms/max": [0.5, 0.5], "gradient_condition/mean": [100.0, 1000.0], "val/loss": [1.0, 1.0]}
    new = {tag if tag == "val/loss" else tag_of(tag): values for tag, values in old.items()}
    read = read_run(write_events(tmp_path / "old", old), "old")
    assert read_run(write_events(tmp_path / "new", new), "new").scalars == read.scalars
    assert read.values("gradient_condition_log10/mean") == pytest.approx([2, 3])
    assert name_of(tag_of("weight_rms/max")) == "weight_rms/max"
    copies = {"at_a_glance/loss": [1.0], "watch_limits/weight_rms": [1.0], "watch/weight_rms/max": [0.5]}
    assert set(read_run(write_events(tmp_path / "copies", copies), "copies").scalars) == {"weight_rms/max"}


@pytest.mark.parametrize(("rms", "code"), [(0.2, 0), (1.5, 0), (9.0, 1)])
def test_check_ends_with_1_if_a_run_is_bad(tmp_path: Path, rms: float, code: int) -> None:
    run = write_events(tmp_path / "run", {**HEALTHY, "weight_rms/max": [rms] * 4})
    with pytest.raises(SystemExit) as ended:
        main(args=["report", "--check", str(run)])
    assert (ended.value.code or 0) == code


def test_loss_speed_and_verdict_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {**HEALTHY, "weight_rms/max": [9.0] * 4, "throughput/tokens_per_second": [1e4] * 4}
    run = write_events(tmp_path / "run", curves)
    with pytest.raises(SystemExit):
        main(args=["report", str(run)])
    lines = capsys.readouterr().out.splitlines()
    first = [line.split()[0] for line in lines[: next(i for i, line in enumerate(lines) if line.startswith("- "))]]
    assert first[:2] == ["run", "steps"]
    assert first[first.index("speed") + 1] == "verdict"
    assert any("bad since step" in line for line in lines)
    assert not any("healthy │" in line for line in lines)
