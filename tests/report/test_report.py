"""The report: its figures against what was written, its verdicts, and what it says of folders that hold no run."""

import csv
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_muon.cli import main
from lightning_muon.report import Comparison, compare, find_runs, print_comparison
from lightning_muon.report.health import Figure

Curves = Mapping[str, Sequence[float]]
Write = Callable[[Path, Curves], Path]

HEALTHY: Curves = {
    "train/loss": [3.0, 2.0, 1.5, 1.2, 1.25],
    "val/loss": [2.5, 1.5, 1.4],
    "weight_rms/max": [0.1, 0.3, 0.4, 0.41, 0.42],
    "bf16_headroom/min": [7.0, 5.0, 2.0, 0.1, 0.01],
    "orthogonality_error/mean": [0.5, 0.4, 0.4, 0.41, 0.42],
    "orthogonality_error/max": [0.9, 0.6, 0.6, 0.6, 0.6],
    "weight_decay/muon": [0.1] * 5,
    "optimizer_share": [0.05, 0.04, 0.04, 0.04, 0.06],
    "update_rms/muon": [0.2, 0.2, 0.21],
    "update_rms/adamw": [1.0, 0.25, 0.2],
    "output_rms/max": [1.0, 1.5, 2.0, 2.0, 2.1],
    "doublings_to_overflow/min": [128.0, 127.0, 126.0, 126.5, 127.0],
    "singular_value_max/max": [1.15] * 5,
    "momentum_stable_rank/mean": [2.0, 3.0, 4.0],
}
SICK: Curves = {
    "val/loss": [2.0, 1.0, 1.5],
    "weight_rms/max": [0.5, 1.0, 2.0, 4.0, 8.0],
    "bf16_headroom/min": [0.4, 0.3, 0.2, 0.1, 0.1],
    "orthogonality_error/mean": [0.95] * 5,
    "weight_decay/muon": [0.1, 0.1, 0.3, 0.5, 0.5, 0.3, 0.1, 0.2],
    "output_rms/max": [1e3, 2e3, 4e3, 8e3, 2e4],
    "doublings_to_overflow/min": [128.0, 60.0, 3.0],
    "singular_value_max/max": [1.2, 9.0, 80.0],
    "optimizer_share": [0.3, 0.3, 0.31],
}


def write_events(folder: Path, curves: Curves, texts: Mapping[str, Sequence[str]] | None = None) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, 25 * step)
        for tag, said in (texts or {}).items():
            for step, text in enumerate(said):
                writer.add_text(tag, text, step)
    return folder


def write_metrics(folder: Path, curves: Curves) -> Path:
    """Write curves as Lightning's CSVLogger does: a row a step, cells left empty."""
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["epoch", *curves, "step"])
        rows.writeheader()
        for step in range(max(map(len, curves.values()))):
            row = {tag: values[step] for tag, values in curves.items() if step < len(values)}
            rows.writerow({**row, "step": 25 * step})
    return folder


def column(comparison: Comparison, place: int = 0) -> dict[str, Figure | None]:
    return {line.label: figures[place] for line, figures in comparison.lines}


@pytest.mark.parametrize("write", [write_events, write_metrics])
def test_figures_are_those_of_the_curves(tmp_path: Path, write: Write) -> None:
    figures = column(compare([write(tmp_path / "run", HEALTHY)], limit=1))
    assert figures["steps"] == Figure("101")
    assert figures["train/loss, final"] == Figure("1.25")
    assert figures["train/loss, best"] == Figure("1.2")
    assert figures["val/loss, above its best"] == Figure("0.0 %", "ok")
    assert figures["weight RMS, largest in the last quarter"] == Figure("0.42", "ok")
    assert figures["weight RMS, peak of the largest"] == Figure("0.42")
    assert figures["weight RMS, growth since the start"] == Figure("×4.2")
    assert figures["weight RMS, growth in the last quarter"] == Figure("+2.4 %", "ok")  # 0.42 / 0.41
    assert figures["bf16 headroom, median of the smallest"] == Figure("2", "ok")  # its fall in the end does not count
    assert figures["orthogonality error, median of the mean"] == Figure("0.41", "ok")
    assert figures["orthogonality error, largest"] == Figure("0.9")
    assert figures["weight decay, largest"] == figures["weight decay, final"] == Figure("0.1")
    assert figures["optimizer's share of the step"] == Figure("4.0 %", "ok")
    assert figures["update RMS of muon, median"] == Figure("0.2")
    assert figures["update RMS of adamw, median"] == Figure("0.25")
    assert figures["layer output RMS, growth in the last quarter"] == Figure("+5.0 %", "ok")  # 2.1 / 2
    assert figures["doublings until bf16 overflows, fewest"] == Figure("126.0", "ok")
    assert figures["singular value of the update, largest"] == Figure("1.15", "ok")
    assert figures["stable rank of the momentum, median"] == Figure("3")
    assert figures["tags with NaN or infinity"] == Figure("0", "ok")


def test_what_is_sick_is_called_so_and_has_advice(tmp_path: Path) -> None:
    comparison = compare([write_events(tmp_path / "sick", SICK)], limit=1)
    figures = column(comparison)
    assert figures["val/loss, above its best"] == Figure("50.0 %", "bad")
    assert figures["weight RMS, largest in the last quarter"] == Figure("8", "bad")
    assert figures["weight RMS, growth in the last quarter"] == Figure("+100.0 %", "watch")
    assert figures["bf16 headroom, median of the smallest"] == Figure("0.2", "bad")
    assert figures["orthogonality error, median of the mean"] == Figure("0.95", "bad")
    assert figures["weight decay, largest"] == Figure("0.5")
    assert figures["weight decay, final"] == Figure("0.2")
    assert figures["layer output RMS, growth in the last quarter"] == Figure("+150.0 %", "bad")
    assert figures["layer output RMS, largest in the last quarter"] == Figure("2e+04", "watch")
    assert figures["doublings until bf16 overflows, fewest"] == Figure("3.0", "bad")
    assert figures["singular value of the update, largest"] == Figure("9", "bad")
    assert figures["optimizer's share of the step"] == Figure("30.0 %", "costly")
    assert comparison.verdicts() == ["bad"]
    advice = "\n".join(comparison.advice(0))
    assert "weight RMS, largest in the last quarter is 8; the weights are large: raise weight_decay" in advice
    assert len(comparison.advice(0)) == sum(f is not None and f.verdict not in {"ok", None} for f in figures.values())


@pytest.mark.parametrize(
    ("bits", "verdict", "of_run"), [([32.0], None, "ok"), ([32.0, 16.0], "bad", "bad"), ([64.0], None, "ok")]
)
def test_headroom_concerns_weights_in_half_precision(
    tmp_path: Path, bits: list[float], verdict: str | None, of_run: str
) -> None:
    """In float32 it says what bfloat16 would cost, which nobody has to pay."""
    curves = {"weight_bits": bits, "bf16_headroom/min": [0.1, 0.2, 0.2, 0.3], "weight_rms/max": [0.1] * 4}
    comparison = compare([write_events(tmp_path / "run", curves)], 1)
    assert column(comparison)["bf16 headroom, median of the smallest"] == Figure("0.2", verdict)
    assert comparison.verdicts() == [of_run]


def test_runs_that_logged_nothing_hide_none_that_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        folder = write_events(tmp_path / f"version_{number}", HEALTHY if number in {1, 4} else {})
        for file in folder.iterdir():
            os.utime(file, (number, number))
    comparison = compare([tmp_path], 2)
    assert [run.name for run in comparison.runs] == ["version_1", "version_4"]
    assert "left out, since nothing was logged there: " in capsys.readouterr().err
    comparison = compare([tmp_path], 1)
    assert [run.name for run in comparison.runs] == ["version_4"]


def test_what_was_steered_away_is_shown_and_not_judged(tmp_path: Path) -> None:
    """Weights that were too large, and are held again by more decay."""
    figures = column(compare([write_events(tmp_path / "run", {"weight_rms/max": [0.5, 2.5, 0.5, 0.5]})], limit=1))
    assert figures["weight RMS, largest in the last quarter"] == Figure("0.5", "ok")
    assert figures["weight RMS, peak of the largest"] == Figure("2.5")


def test_nan_and_infinity_are_shown_and_bad(tmp_path: Path) -> None:
    curves = {
        "train/loss": [2, 1, 1.5, math.nan],
        "weight_rms/max": [0.1, 0.2, 0.3, math.inf],
        "bf16_headroom/min": [2.0],
    }
    for write in (write_events, write_metrics):
        comparison = compare([write(tmp_path / write.__name__, curves)], limit=1)
        figures = column(comparison)
        assert figures["train/loss, final"] == Figure("nan", "bad")
        assert figures["train/loss, best"] == Figure("1")
        assert figures["weight RMS, largest in the last quarter"] == Figure("inf", "bad")
        assert figures["tags with NaN or infinity"] == Figure("2", "bad")
        assert figures["bf16 headroom, median of the smallest"] == Figure("2", "ok")
        assert "not finite: train/loss, weight_rms/max" in comparison.advice(0)


def test_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, curves in (("version_2", HEALTHY), ("version_10", SICK)):
        write_events(tmp_path / "logs" / name, curves)
    write_metrics(tmp_path / "elsewhere" / "version_0", {"val/loss": [1.0, 0.8, 0.6, 0.5]})
    comparison = compare([tmp_path / "logs", tmp_path / "elsewhere"], limit=5)
    names = ["elsewhere/version_0", "logs/version_2", "logs/version_10"]
    assert [group.name for group in comparison.groups] == names
    assert [column(comparison, place)["val/loss, final"].value for place in range(3)] == ["0.5", "1.4", "1.5"]
    assert column(comparison, 0)["weight RMS, largest in the last quarter"] is None
    assert comparison.verdicts() == ["not measured", "ok", "bad"]
    assert capsys.readouterr().err == ""


def test_cost_and_a_few_spikes_are_told_and_are_no_illness(tmp_path: Path) -> None:
    run = {**HEALTHY, "optimizer_share": [0.6] * 3, "gradient_spikes": [1, 5, 0]}
    comparison = compare([write_events(tmp_path / "ok", run)], limit=1)
    assert column(comparison)["optimizer's share of the step"] == Figure("60.0 %", "costly")
    assert column(comparison)["gradient spikes within 1000 steps, most"] == Figure("5", "ok")
    assert comparison.verdicts() == ["ok"]
    assert comparison.remarks(0) == [
        "costly: optimizer's share of the step is 60.0 %; the optimizer takes much of the step: take larger batches,"
        " the preset optimizer/fast, or more devices"
    ]
    often = compare([write_events(tmp_path / "often", {**HEALTHY, "gradient_spikes": [1, 6, 0]})], limit=1)
    assert often.verdicts() == ["watch"]


@pytest.mark.parametrize(
    ("curves", "verdict"),
    [
        ({"val/loss": [1.0] * 4}, "not measured"),
        ({"val/loss": [1.0] * 4, "optimizer_share": [0.1], "update_rms/muon": [0.2]}, "not measured"),
        (
            {"val/loss": [1.0] * 4, "momentum_condition_log10/mean": [3.0]},
            "not measured",
        ),  # for which no range is known
        ({"val/loss": [math.nan]}, "bad"),
        ({"val/loss": [1.0], "orthogonality_error/mean": [0.4] * 4}, "ok"),
    ],
)
def test_a_run_without_monitors_is_not_called_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], curves: Curves, verdict: str
) -> None:
    run = write_events(tmp_path / "run", curves)
    comparison = compare([run], limit=1)
    assert comparison.verdicts() == [verdict]
    told = any(line.startswith("not measured: no monitor has logged") for line in comparison.advice(0))
    assert told == (verdict == "not measured")
    with pytest.raises(SystemExit) as stop:
        main(args=["report", "--all", str(run)])
    assert stop.value.code == 0
    assert f"| **verdict** | ok | **{verdict}** |" in (run / "report" / "report.md").read_text()
    assert re.search(rf"verdict +│ ok +│ +{verdict} │", capsys.readouterr().out)


@pytest.mark.parametrize(("width", "most"), [(60, 1), (80, 2), (160, 7)])
def test_all_figures_stand_side_by_side_where_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, most: int
) -> None:
    names = [f"version_{place}" for place in range(6)] + ["an_experiment_with_a_rather_long_name"]
    monkeypatch.setenv("COLUMNS", str(width))
    for number in range(1, 8):
        write_events(tmp_path / names[number - 1], HEALTHY if number % 2 else SICK)
        comparison = compare([tmp_path], limit=9)
        print_comparison(comparison, figures=True)
        printed = capsys.readouterr().out
        assert len(comparison.groups) == number
        assert ("Health" in printed) == (number <= most)
        if number > most:
            assert "report.md has the health of each" in printed
            assert max(map(len, printed.splitlines())) <= max(width, len(f"best: {tmp_path}/{names[-1]}"))
            continue
        table = printed[printed.index("Health") :]
        assert max(map(len, table.splitlines()[:20])) <= width
        rows: list[list[str]] = []
        for line in re.findall("^│(.*)│$", table, re.MULTILINE):
            label, *cells = (cell.strip() for cell in line.split("│"))
            if any(cells):
                rows.append([label, *cells])
            else:  # the label goes on
                rows[-1][0] += f" {label}"
        shown = {label: cells for label, _, *cells in rows}
        for line, figures in comparison.lines:
            assert shown[line.label] == [f"{f.value} {f.verdict or ''}".rstrip() if f else "–" for f in figures]
        assert shown["verdict"] == comparison.verdicts()


def test_of_many_runs_the_latest_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        run = write_metrics(tmp_path / f"version_{number}", {"val/loss": [1.0]})
        os.utime(run / "metrics.csv", (1000 - number, 1000 - number))
    comparison = compare([tmp_path], limit=2)
    assert [run.name for run in comparison.runs] == ["version_0", "version_1"]
    assert capsys.readouterr().err == "the 2 latest of 4 runs are shown; --limit 4 shows all\n"


def test_both_loggers_in_one_folder_are_one_run(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", {"val/loss": [9.0], "only/csv_loss": [3.0]})
    write_events(tmp_path / "run", {"val/loss": [1.0]})
    assert find_runs([tmp_path, tmp_path / "run"]) == [tmp_path / "run"]
    figures = column(compare([tmp_path], limit=5))
    assert (figures["val/loss, final"], figures["only/csv_loss, final"]) == (Figure("1"), Figure("3"))


def test_what_the_monitors_said_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"warnings": ["net.0.weight is not finite"], "weight_decay/decisions": ["step 9: on", "step 20: off"]}
    run = write_events(tmp_path / "run", {"val/loss": [1.0]}, texts)
    with pytest.raises(SystemExit) as stop:
        main(args=["report", "--all", str(run), "--output", str(tmp_path / "out")])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "report.md").read_text()
    for text in ("net.0.weight is not finite", "step 9: on", "step 20: off"):
        assert f"- {text}" in printed
        assert f"- {text}" in page
    assert "| warnings | 0 | 1 watch |" in page


def test_the_page_is_a_table_of_the_figures(tmp_path: Path) -> None:
    write_events(tmp_path / "a|b", HEALTHY)
    write_events(tmp_path / "c", SICK)
    with pytest.raises(SystemExit):
        main(args=["report", "--all", str(tmp_path), "--output", str(tmp_path / "new" / "out")])
    lines = (tmp_path / "new" / "out" / "report.md").read_text().splitlines()
    assert lines[0] == "# 2 runs, by val/loss"
    assert "| a\\|b | 1.400 | 101 | ok |" in lines
    assert "| quantity | healthy | a\\|b | c |" in lines
    assert "| weight RMS, largest in the last quarter | under 1 | 0.42 ok | 8 bad |" in lines
    assert "| **verdict** | ok | **ok** | **bad** |" in lines
    assert "- bad: orthogonality error, median of the mean is 0.95" in "\n".join(lines)


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_events(tmp_path / "run", HEALTHY)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        main(args=["report", "--all", str(run)])
    assert stop.value.code == 0
    assert "no plots without matplotlib: pip install matplotlib\n" in capsys.readouterr().out
    assert [path.name for path in (run / "report").iterdir()] == ["report.md"]
    assert "![" not in (run / "report" / "report.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
def test_curves_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    run = write_events(tmp_path / "run", HEALTHY)
    with pytest.raises(SystemExit):
        main(args=["report", "--all", str(run)])
    assert sorted(path.name for path in (run / "report").iterdir()) == ["curves.png", "health-1.png", "report.md"]
    assert "](curves.png)" in (run / "report" / "report.md").read_text()
    colours = Image.open(run / "report" / "curves.png").convert("RGB").getcolors(1 << 24)
    assert any(colour == (31, 119, 180) for _, colour in colours)  # the first run's


def broken_events(folder: Path) -> Path:
    folder.mkdir()
    (folder / "events.out.tfevents.1.host").write_bytes(bytes(range(256)) * 8)
    return folder


def broken_metrics(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,loss\n1,0.5\n2,oops\n")
    return folder


def other_csv(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.csv").write_text("name,value\na,1\n")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def started(folder: Path) -> Path:
    return write_events(folder, {})


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda folder: folder, "log folder '{run}' does not exist"),
        (empty, "no run in '{run}': neither events.out.tfevents* nor metrics.csv is in it or below"),
        (started, "no run in '{run}' has logged a value yet"),
        (
            broken_events,
            "'{run}/events.out.tfevents.1.host' is not a TensorBoard event file, or is damaged from its beginning",
        ),
        (broken_metrics, "'{run}/metrics.csv', line 3: could not convert string to float: 'oops'"),
        (other_csv, "'{run}/metrics.csv' has no column 'step': it is not a file of Lightning's CSVLogger"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], line: str
) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main(args=["report", "--all", str(run)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {line.format(run=run)}\n"
    assert not (run / "report").exists()


def test_a_broken_run_among_others_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = broken_events(tmp_path / "broken")
    write_events(tmp_path / "whole", HEALTHY)
    assert [run.name for run in compare([tmp_path], limit=5).runs] == ["whole"]
    assert f"left out: '{broken}/events" in capsys.readouterr().err


def test_a_cut_off_event_file_is_read_up_to_there(tmp_path: Path) -> None:
    run = write_events(tmp_path / "run", {"val/loss": [1.0, 0.5]})
    (file,) = run.glob("events*")
    file.write_bytes(file.read_bytes()[:-5])
    assert column(compare([run], limit=1))["val/loss, final"] == Figure("1")


def test_a_report_that_cannot_be_written_names_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_events(tmp_path / "run", HEALTHY)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(args=["report", "--all", str(run), "--output", str(tmp_path / "file" / "below")])
    assert stop.value.code == 2
    assert f"cannot write the report to '{tmp_path}/file/below'" in capsys.readouterr().err


def test_an_older_report_stays_if_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_events(tmp_path / "run", HEALTHY)
    (run / "report").mkdir()
    (run / "report" / "report.md").write_text("the old one")

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit):
        main(args=["report", "--all", str(run)])
    assert [path.name for path in (run / "report").glob("*report*")] == ["report.md"]
    assert (run / "report" / "report.md").read_text() == "the old one"


def test_the_command_does_not_wait_for_torch(tmp_path: Path) -> None:
    run = write_events(tmp_path / "run", HEALTHY)
    code = "import sys, runpy; sys.argv = ['x', 'report', sys.argv[1]]\n" + (
        "try: runpy.run_module('lightning_muon.cli', run_name='__main__')\n"
        "finally: print([name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.stdout.splitlines()[-1] == "[]", finished.stderr


def test_the_room_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lightning_muon.report import *\n"
        "print([name for name in ('torch', 'lightning', 'matplotlib', 'lightning_muon.cli') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert finished.stdout == "[]\n", finished.stderr


def test_help_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(args=["--help"])
    assert "    report              Show the health of one run" in capsys.readouterr().out
