"""What a comparison says and draws: of runs that finished, diverged, failed, or have not run yet."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_muon.experiments.outcome import Finalist, FinalRun, Outcome, OutcomeFileError, Setting, TuningRun
from lightning_muon.experiments.output import HORIZONS, PAGE, TUNING, VALUES, markdown, print_outcome, write_outcome
from lightning_muon.experiments.plots import colours, draw_horizons, draw_tuning
from lightning_muon.experiments.standings import Standing, sentence, standings
from lightning_muon.experiments.trial import Result

STEPS = (150, 212, 300)
SEEDS = (1, 2, 3, 4)
NOISE = {1: 0.002, 2: -0.001, 3: -0.002, 4: 0.001}
SETTING = Setting("a GPT on bytes", "val/loss", 1_020_000, 8192, device="2 CPU cores")


def final(steps: int, seed: int, ratio: float, time: float = 0.1, **changes: object) -> FinalRun:
    """Return a run of an optimizer that needs so many times the steps of the baseline."""
    # Without noise of the run's own there would be no interval.
    noise = NOISE[seed] * (1 + (steps == 300) * (ratio != 1) + 0.5 * (steps == 212))
    loss = 1.5 + 0.3 * (300 * ratio / steps) ** 0.5 + 0.01 * seed + noise
    figures = {"optimizer_share": 0.125}
    result = Result("finished", loss, steps, time * (1 + NOISE[seed]), "ok", figures)
    return FinalRun(steps, seed, replace(result, **changes))


def finalist(name: str, ratio: float, time: float = 0.1, **changes: object) -> Finalist:
    tuning = (
        *(TuningRun("lr", {"lr": lr, "weight_decay": 0.1}, "finished", 1.8 + lr) for lr in (0.01, 0.02, 0.04)),
        TuningRun("lr", {"lr": 0.08, "weight_decay": 0.1}, "diverged"),
        TuningRun("weight_decay", {"lr": 0.01, "weight_decay": 0.0}, "finished", 1.79),
    )
    runs = tuple(final(steps, seed, ratio, time) for steps in STEPS for seed in SEEDS)
    made = Finalist(name, {"lr": 0.01, "weight_decay": 0.0}, tuning, runs, state_bytes=4_080_000)
    return replace(made, **changes)


def compared(*finalists: Finalist) -> Outcome:
    return Outcome("adamw", (finalist("adamw", 1.0), *finalists), SETTING)


def changed(of: Finalist, steps: int, seed: int, **changes: object) -> Finalist:
    """Return a finalist with another result of one of its runs."""
    runs = (
        replace(run, result=replace(run.result, **changes)) if (run.horizon, run.seed) == (steps, seed) else run
        for run in of.runs
    )
    return replace(of, runs=tuple(runs))


def standing(outcome: Outcome, name: str) -> Standing:
    return next(one for one in standings(outcome) if one.name == name)


def test_finalists_are_sorted_by_final_loss_and_compared_with_the_baseline() -> None:
    outcome = compared(finalist("slow", 1.2), finalist("muon", 0.7, 0.11), finalist("sgd", 3.0))
    assert [one.name for one in standings(outcome)] == ["muon", "adamw", "slow", "sgd"]
    muon, baseline, slow, sgd = standings(outcome)
    assert muon.steps.value == pytest.approx(0.7, rel=0.02)
    assert muon.steps.low < 0.7 < muon.steps.high < 0.75
    assert muon.seconds.value == pytest.approx(0.77, rel=0.02)
    assert muon.difference.high < 0
    assert muon.optimizer_share == 0.125
    assert slow.steps.value == pytest.approx(1.2, rel=0.02)
    assert sgd.steps.text() == "at least 2.00"
    assert (baseline.steps, baseline.difference, baseline.loss.value) == (None, None, pytest.approx(1.825, abs=0.001))
    assert muon.notes == ("1 of 5 tuning runs diverged",)


def test_a_worse_optimizer_needs_no_shorter_runs() -> None:
    slow = finalist("slow", 1.2)
    slow = replace(slow, runs=tuple(run for run in slow.runs if run.horizon == 300))
    assert standing(compared(slow), "slow").steps.value == pytest.approx(1.2, rel=0.02)


def test_divergence_is_told_and_no_ratio_is_made_of_the_survivors() -> None:
    at_the_end = changed(finalist("a", 0.7), 300, 2, status="diverged", value=None)
    earlier = changed(finalist("b", 0.7), 150, 2, status="diverged", value=math.nan)
    outcome = compared(at_the_end, earlier)
    a, b = standing(outcome, "a"), standing(outcome, "b")
    assert (a.diverged, a.loss, a.difference, a.steps, a.seconds) == (1, None, None, None, None)
    assert "1 of 4 runs of 300 steps diverged" in a.notes
    assert "not compared, because a diverged" in a.notes
    assert standings(outcome)[-1].name == "a"
    assert (b.diverged, b.steps) == (1, None)
    assert b.difference.high < 0
    assert "no ratios, because b diverged" in b.notes
    assert "| a | – | – | – | 1 of 12 |" in markdown(outcome)
    assert "diverged" in sentence(outcome, "a")
    both = Outcome("a", outcome.finalists, SETTING)
    assert "not compared, because a diverged" in standing(both, "adamw").notes


def test_a_run_that_failed_leaves_its_seed_out_and_says_so() -> None:
    failed = changed(finalist("muon", 0.7), 212, 3, status="failed", value=None, message="out of memory")
    muon = standing(compared(failed), "muon")
    assert muon.diverged == 0
    assert muon.steps.value == pytest.approx(0.7, rel=0.02)
    assert "1 of 4 runs of 212 steps have no loss (out of memory)" in muon.notes
    assert "compared by 3 of 4 seeds, of which all runs have a loss" in muon.notes


def test_a_comparison_that_is_not_at_its_end_says_what_is_known() -> None:
    muon = finalist("muon", 0.7)
    half = replace(muon, runs=tuple(run for run in muon.runs if run.horizon != 150 or run.seed == 1))
    assert standing(compared(half), "muon").steps.contains(0.7)  # without the length that has one seed so far
    none = Outcome("adamw", (replace(muon, name="adamw", runs=()), replace(muon, runs=())), SETTING)
    assert standing(none, "muon").loss is None
    assert "not compared: no seed with a loss after 0 steps" in sentence(none)
    alone = replace(muon, runs=tuple(run for run in muon.runs if run.horizon == 300))
    only = replace(finalist("adamw", 1.0), runs=tuple(run for run in finalist("adamw", 1.0).runs if run.horizon == 300))
    assert "no ratios, which need shorter runs too" in standing(Outcome("adamw", (only, alone)), "muon").notes


def test_the_sentence_says_how_it_was_measured() -> None:
    text = sentence(compared(finalist("muon", 0.7, 0.11), finalist("slow", 1.2)))
    for part in (
        "For the final loss of adamw, muon, the best of 2, needs 0.70 times its steps (95 % interval 0.",
        "times its seconds",
        "a GPT on bytes (1.02 million parameters) on 2 CPU cores",
        "150, 212 and 300 steps of 8192 tokens, 4 seeds, each optimizer tuned in 5 runs",
        "Small models do not speak for large ones.",
    ):
        assert part in text
    same = compared(finalist("muon", 1.002))
    assert "Between muon and adamw no difference was found" in sentence(same)
    assert "no difference found" in markdown(same)
    assert sentence(compared()) == "There is nothing to compare adamw with."


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    diverged = changed(finalist("muon", 0.7), 150, 1, status="diverged", value=math.inf)
    outcome = compared(diverged, finalist("na*me", 0.9))
    written, no_plots = write_outcome(outcome, tmp_path / "new")
    assert no_plots is None
    assert {path.name for path in written} == {VALUES, PAGE, HORIZONS, TUNING}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in written}
    text = (tmp_path / "new" / VALUES).read_text(encoding="utf-8")
    read = Outcome.from_json(text)
    assert standings(read) == standings(outcome)
    assert read == Outcome.from_json(outcome.to_json())
    assert json.loads(text)["standings"][0]["steps"] is None
    page = (tmp_path / "new" / PAGE).read_text(encoding="utf-8")
    assert r"| na\*me | 1" in page
    assert f"]({TUNING})" in page
    for name in (HORIZONS, TUNING):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"baseline": "a", "finalists": [{}], "setting": {}}'])
def test_a_file_that_is_no_comparison_is_one_line(text: str) -> None:
    with pytest.raises(OutcomeFileError, match="this is not the outcome of a comparison"):
        Outcome.from_json(text)


def test_the_baseline_is_one_of_the_finalists() -> None:
    with pytest.raises(ValueError, match="the baseline 'sgd' is none of adamw"):
        Outcome("sgd", (finalist("adamw", 1),))
    with pytest.raises(ValueError, match="two finalists have the same name: adamw, adamw"):
        compared(finalist("adamw", 1))


def test_the_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_outcome(compared(finalist("moonlight", 0.7), finalist("same", 1.002)))
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    (line,) = (line for line in printed.splitlines() if line.strip().startswith("moonlight ") and "±" in line)
    assert line.split()[4] == "0.70"
    assert "lr 0.01," in printed
    assert "4.00" in printed  # bytes of state for each parameter
    assert "- moonlight: 1 of 5 tuning runs diverged" in printed


def test_each_optimizer_has_a_colour_also_where_there_are_many() -> None:
    outcome = compared(*(finalist(f"optimizer {number}", 0.9) for number in range(12)))
    found = colours(outcome)
    assert len(set(found.values())) == 11


def test_there_is_no_plot_of_nothing(tmp_path: Path) -> None:
    empty = Outcome("adamw", (Finalist("adamw", {}),))
    assert not draw_horizons(empty, tmp_path / "a.png")
    assert not draw_tuning(empty, tmp_path / "b.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_are_tables_and_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="plots need the package matplotlib"):
        draw_horizons(compared(), tmp_path / "a.png")
    written, no_plots = write_outcome(compared(finalist("muon", 0.7)), tmp_path)
    assert [path.name for path in written] == [VALUES, PAGE]
    assert no_plots == "plots need the package matplotlib: pip install matplotlib"
    assert "![" not in (tmp_path / PAGE).read_text(encoding="utf-8")
