"""Several runs: what differs between them, seeds as one group, the order, and which are too short to judge."""

import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from lightning_muon.cli import main
from lightning_muon.report import Comparison, compare
from lightning_muon.report.health import MIN_STEPS, Figure
from lightning_muon.report.settings import short_names

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002, "betas": [0.9, 0.95], "fused": None}}
MUON = {"class_path": "lightning_muon.optim.MuonAdamW", "init_args": {"lr": 0.02, "momentum": 0.95}}
DESCENT = (3.0, 2.0, 1.5, 1.2)


def config(optimizer: Mapping[str, Any] = ADAMW, seed: int = 1, **model: Any) -> dict[str, Any]:
    """Settings as the command line saves them."""
    folder = f"logs/{seed}"
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": folder}}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": folder}}
    trainer = {"max_steps": 100, "logger": logger, "callbacks": [checkpoint], "default_root_dir": folder}
    return {
        "seed_everything": seed,
        "trainer": trainer,
        "model": {"optimizer": optimizer, **model},
        "ckpt_path": f"{folder}/last.ckpt",
    }


def write(
    folder: Path,
    settings: Any = None,
    loss: float = 1.0,
    *,
    every: int = 25,
    name: str = "config.yaml",
    **curves: Sequence[float],
) -> Path:
    """Write a healthy run of four logged values with a final validation loss, unless curves say otherwise."""
    default = {"train/loss": DESCENT, "val/loss": [loss], "weight_rms/max": [0.1] * 4}
    given = {tag.replace("__", "/"): values for tag, values in curves.items()}
    with SummaryWriter(str(folder)) as writer:
        for tag, values in {**default, **given}.items():
            start = 4 - len(values) if tag == "val/loss" else 0
            for place, value in enumerate(values, start):
                writer.add_scalar(tag, value, every * place + every - 1)
    if settings is not None:
        (folder / name).write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return folder


def with_lr(lr: float) -> dict[str, Any]:
    return {**ADAMW, "init_args": {**ADAMW["init_args"], "lr": lr}}  # type: ignore[dict-item]


def names(comparison: Comparison) -> list[str]:
    return [group.name for group in comparison.groups]


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args=["report", "--all", *map(str, arguments)])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_runs_are_named_by_what_differs_and_seeds_are_one_group(tmp_path: Path) -> None:
    losses = {0.001: [1.5, 1.52, 1.57], 0.004: [1.2, 1.23, 1.21]}
    for lr, of_lr in losses.items():
        for seed, loss in enumerate(of_lr):
            write(
                tmp_path / f"a long name {lr} {seed}", config(with_lr(lr), seed), loss, weight_rms__max=[loss / 10] * 4
            )
    comparison = compare([tmp_path], 99)
    assert names(comparison) == ["lr=0.004", "lr=0.001"]
    assert [group.seeds for group in comparison.groups] == ["0–2", "0–2"]
    figures = {line.label: of_line for line, of_line in comparison.lines}
    found = [f"{statistics.fmean(losses[lr]):.3f} ± {statistics.stdev(losses[lr]):.3f}" for lr in (0.004, 0.001)]
    assert figures["val/loss, final"] == [Figure(text) for text in found]
    assert [comparison.metric.text(group) for group in comparison.groups if comparison.metric] == found
    assert figures["steps"] == [Figure("100"), Figure("100")]
    assert figures["weight RMS, largest in the last quarter"][1] == Figure("0.1530 ± 0.0036", "ok")


def test_of_a_group_the_worst_run_gives_the_verdict(tmp_path: Path) -> None:
    for seed, rms in enumerate((0.5, 0.5, 9.0)):
        write(tmp_path / str(seed), config(seed=seed), weight_rms__max=[rms] * 4)
    comparison = compare([tmp_path], 99)
    assert (names(comparison), comparison.verdicts()) == (["3 seeds"], ["bad"])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # The options of another class are no differences of their own.
        (config(MUON), config(), ["MuonAdamW, lr=0.02", "AdamW, lr=0.002"]),
        (config(lr_by_role={"head": 0.1}), config(lr_by_role=None), ["head=0.1", "head=–"]),
        (config(compile=True), config(compile=False), ["compile=true", "compile=false"]),
        (config(a={"lr": 1}), config(a={"lr": 2}), ["lr=1", "lr=2"]),
        (config(a={"lr": 1}, b={"lr": 4}), config(a={"lr": 2}, b={"lr": 3}), ["a.lr=1, b.lr=4", "a.lr=2, b.lr=3"]),
        (config(x=0.1234567), config(x=0.1234568), ["x=0.1234567", "x=0.1234568"]),
        # Keys with the same values are one.
        (config(a=2, b=2), config(a=3, b=3), ["a=2", "a=3"]),
        (config(net={"class_path": "a.Net"}), config(net={"class_path": "b.Net"}), ["a.Net", "b.Net"]),
        (config(), config(), ["one", "two"]),
        (config(), None, ["one", "two"]),
        ("- no: [mapping", config(), ["one", "two"]),
    ],
)
def test_what_differs_is_written_short(tmp_path: Path, first: Any, second: Any, expected: list[str]) -> None:
    write(tmp_path / "one", first, 1.0)
    write(tmp_path / "two", second, 2.0)
    assert names(compare([tmp_path], 9)) == expected


def test_a_callback_that_only_one_run_has_is_a_difference(tmp_path: Path) -> None:
    one, two = config(), config()
    decay = {"class_path": "lightning_muon.callbacks.AutoWeightDecay", "init_args": {"limit": 1.0, "horizon": 200}}
    two["trainer"]["callbacks"] = [decay, *two["trainer"]["callbacks"]]
    write(tmp_path / "one", one, 1.0)
    write(tmp_path / "two", two, 2.0)
    assert names(compare([tmp_path], 9)) == ["AutoWeightDecay=–", "AutoWeightDecay=yes"]


def test_settings_are_the_latest_config_or_else_hparams(tmp_path: Path) -> None:
    """A run that goes on in its folder writes a further config; hparams may have Python's objects in them."""
    for name, lr in (("one", 0.1), ("two", 0.2)):
        hparams = (
            f"lr: {lr}\nbetas: !!python/tuple\n- 0.9\n- 0.95\nloss: !!python/name:torch.nn.MSELoss ''\nseed: {lr}\n"
        )
        write(tmp_path / "scripts" / name, hparams, lr, name="hparams.yaml")
        write(tmp_path / "runs" / name, config(with_lr(7)), lr)
        write(tmp_path / "runs" / name, config(with_lr(lr)), lr, name="config-10.yaml")
        write(tmp_path / "runs" / name, config(with_lr(3)), lr, name="config-9.yaml")
    for kind in ("scripts", "runs"):
        assert names(compare([tmp_path / kind], 9)) == ["lr=0.1", "lr=0.2"]


def test_a_run_that_was_interrupted_is_not_in_the_mean(tmp_path: Path) -> None:
    """Nor is an earlier run with the same seed."""
    for seed, every in enumerate((25, 25, 18)):
        write(tmp_path / f"version_{seed}", config(seed=seed), 1.0 + seed, every=every)
    write(tmp_path / "version_3", config(seed=1), 5.0)
    comparison = compare([tmp_path], 9)
    runs = {group.name: [run.name for run in group.runs] for group in comparison.groups}
    assert runs == {
        "version_1": ["version_1"],
        "version_2": ["version_2"],
        "2 seeds": ["version_0", "version_3"],
    }
    for folder in tmp_path.iterdir():  # which early stopping may have ended
        stopping = yaml.safe_load((folder / "config.yaml").read_text())
        stopping["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.EarlyStopping"})
        (folder / "config.yaml").write_text(yaml.safe_dump(stopping))
    assert sorted(len(group.runs) for group in compare([tmp_path], 9).groups) == [1, 3]


@pytest.mark.parametrize(
    ("metric", "curves", "order"),
    [
        (None, {"val/loss": (3, 1, 2)}, "bca"),
        (None, {"val/loss": (3, math.nan, 2)}, "cab"),
        (None, {"val_loss": (3, 1, 2), "val/loss_of_part": (1, 2, 3)}, "bca"),
        (None, {"train/loss": (3, 1, 2)}, "bca"),
        (None, {}, "abc"),
        ("val/accuracy", {"val/loss": (3, 1, 2), "val/accuracy": (0.1, 0.3, 0.2)}, "bca"),
        ("val_acc", {"val/loss": (1, 2, 3), "val_acc": (0.1, 0.3, 0.2)}, "bca"),
        ("val/f1", {"val/loss": (1, 2, 3), "val/f1": (0.1, 0.3, 0.2)}, "bca"),
        ("val/error", {"val/loss": (1, 2, 3), "val/error": (0.3, 0.1, 0.2)}, "bca"),
    ],
)
def test_the_best_comes_first(
    tmp_path: Path, metric: str | None, curves: Mapping[str, tuple[float, ...]], order: str
) -> None:
    for place, run in enumerate("abc"):
        with SummaryWriter(str(tmp_path / run)) as writer:
            writer.add_scalar("weight_rms/max", 0.1, 100)
            for tag, values in curves.items():
                writer.add_scalar(tag, values[place], 100)
    assert "".join(names(compare([tmp_path], 9, metric))) == order


def test_a_metric_that_no_run_has_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main(args=["report", "--all", str(run), "--metric", "val/acc"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no run has logged 'val/acc'; there are train/loss, val/loss\n"


@pytest.mark.parametrize(
    ("every", "curves", "reason"),
    [
        (14, {}, f"56 steps; a verdict needs {MIN_STEPS}"),
        (15, {}, ""),
        (50, {"weight_rms__max": [9.0] * 3}, "its health was measured at 3 steps; a verdict needs 4"),
        (25, {"lr-AdamW": [0.1, 0.2, 0.3, 0.4]}, "the learning rate still rises at step 99"),
        (25, {"lr-AdamW": [0.1, 0.2, 0.3, 0.3]}, ""),
        (25, {"lr-AdamW": [0.3, 0.2, 0.1, 0.0]}, ""),
        (25, {"lr-AdamW": [0.3] * 4}, ""),
    ],
)
def test_a_run_that_is_too_short_is_called_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int, curves: Any, reason: str
) -> None:
    """It has no verdict, whatever its figures, and stands behind those that have one."""
    healthy = {"weight_rms__max": [9.0] * 4, **curves}
    write(tmp_path / "short", config(seed=1), 0.5, every=every, **healthy)
    comparison = compare([tmp_path / "short"], 9)
    assert comparison.verdicts() == ["too short to judge" if reason else "bad"]
    verdicts = {figures[0].verdict for _, figures in comparison.lines if figures[0]}
    assert ("bad" in verdicts) == (not reason)
    write(tmp_path / "long", config(with_lr(1)), 1.0)
    assert names(compare([tmp_path], 9)) == (["lr=1", "lr=0.002"] if reason else ["lr=0.002", "lr=1"])
    out = report(capsys, tmp_path)
    assert (f"too short to judge: {reason}" in out) == bool(reason)


def test_what_is_not_finite_is_bad_however_short(tmp_path: Path) -> None:
    write(tmp_path / "run", every=1, train__loss=[1, math.nan])
    assert compare([tmp_path], 1).verdicts() == ["bad"]
    write(tmp_path / "ended", every=1, went_bad=[3])
    assert compare([tmp_path / "ended"], 1).verdicts() == ["bad"]


def study(folder: Path) -> Path:
    """Write what a sweep leaves: a run for each of ten settings, one of them with three seeds."""
    (folder / "journal.jsonl").parent.mkdir(parents=True)
    (folder / "journal.jsonl").write_text("{}\n")
    for place in range(10):
        for seed in range(42, 45 if place == 3 else 43):
            lr, width = 0.001 * (place + 1), 64 * (1 + place % 2)
            settings = config(with_lr(lr), seed, net={"class_path": "my.Net", "init_args": {"width": width}})
            rms = [5.0] * 4 if place > 7 else [0.1] * 4
            name = f"lr={lr},width={width},seed_everything={seed}"
            write(folder / "runs" / name, settings, abs(lr - 0.0041) * 1000 + seed / 100, weight_rms__max=rms)
    return folder


def test_the_folder_of_a_study_is_an_overview(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = study(tmp_path / "logs" / "sweep" / "lr,width")
    page = folder / "report" / "report.md"
    printed: dict[str, list[str]] = {}
    for width in ("44", "80", "120", ""):
        monkeypatch.setenv("COLUMNS", width) if width else monkeypatch.delenv("COLUMNS", raising=False)
        printed[width] = lines = report(capsys, folder).splitlines()
        assert lines[0].strip() == "12 runs, by val/loss"
        assert f"best: {folder}/runs/lr=0.004,width=128,seed_everything=42 and 2 more" in lines
        table = lines[: next(place for place, line in enumerate(lines) if line.startswith("best: "))]
        assert max(map(len, table)) <= int(width or 240)
    wide = printed["80"]
    assert wide[2].split() == ["width", "lr", "seeds", "val/loss", "steps", "verdict"]
    assert wide[4].split() == ["128", "0.004", "3", "(42–44)", "0.530", "±", "0.010", "100", "ok"]
    assert wide[5].split() == ["64", "0.005", "1", "(42)", "1.320", "100", "ok"]
    advice = [line for line in wide if line.startswith("- ")]
    assert advice[0].startswith("- 2 of 10 bad: weight RMS, largest in the last quarter; the weights are large:")
    assert " ".join(printed["44"][2].split()) == "settings seeds val/loss steps verdict"
    text = page.read_text()
    assert "| width | lr | seeds | val/loss | steps | verdict |" in text
    assert "| 128 | 0.004 | 3 (42–44) | 0.530 ± 0.010 | 100 | ok |" in text
    assert text.count("| quantity | healthy |") == 2  # of five groups each
    assert text.count(f"{folder}/runs/") == 12


def test_a_reader_that_stops_is_no_error(tmp_path: Path) -> None:
    """As ``report logs | head -1`` does; the page is written all the same."""
    program = "from lightning_muon.cli import main; import sys; main(args=['report', *sys.argv[1:]])"
    command = [sys.executable, "-c", program, str(study(tmp_path / "study"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1
    assert (tmp_path / "study" / "report" / "report.md").exists()


def test_of_many_runs_it_is_told_once_why_they_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for place in range(5):
        run = write(tmp_path / str(place), config(with_lr(place + 1)), every=5)
    (run / "metrics.csv").write_text("no table")
    lines = " ".join(report(capsys, tmp_path).split())
    assert f"- 5 of 5 too short to judge: 20 steps; a verdict needs {MIN_STEPS}" in lines
    assert lines.replace(" ", "").count("metrics.csv'hasnocolumn'step'") == 1  # a long path is broken
    assert "best: " not in lines


def test_runs_without_settings_have_the_names_of_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "version_0", None, 2.0)
    write(tmp_path / "version_1", None, 1.0)
    lines = report(capsys, tmp_path).splitlines()
    assert [lines[place].split() for place in (2, 4, 5)] == [
        ["run", "val/loss", "steps", "verdict"],
        ["version_1", "1.000", "100", "ok"],
        ["version_0", "2.000", "100", "ok"],
    ]


def test_names_of_keys_are_as_short_as_tells_them_apart() -> None:
    assert short_names(["a.lr", "b.init_args.lr", "c"]) == ["a.lr", "b.lr", "c"]
    assert short_names(["a.b.lr", "b.lr"]) == ["a.b.lr", "b.lr"]
