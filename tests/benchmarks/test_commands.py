"""Each benchmark runs with ``--quick`` and writes its record to the given folder."""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks import (
    monitors,
    optimizer_state,
    optimizer_step,
    orthogonalization,
    routing_corpus,
    sick_runs,
    traffic,
    turns,
    variants,
)
from benchmarks.matrix_problems import __main__ as matrix_problems
from benchmarks.matrix_problems.methods import METHODS
from benchmarks.matrix_problems.problems import PROBLEMS, Problem
from benchmarks.matrix_problems.stopped_polargrad import two_qdwh_steps
from lightning_muon import callbacks
from lightning_muon.optim.polar.orthogonalize import OrthogonalizerName
from tests.processes import REPOSITORY, run_module


def record(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["settings"]["quick"]
    return content


# The other problems take the same way, and longer.
@pytest.mark.parametrize(
    "problem", [pytest.param(one, marks=() if one == "quadratic" else pytest.mark.slow) for one in PROBLEMS]
)
def test_matrix_problems(problem: str, tmp_path: Path) -> None:
    matrix_problems.main(["--quick", "--problems", problem, "--results", str(tmp_path)])
    rows = record(tmp_path / f"matrix_problems-{problem}.json")["rows"]
    expected = [(name, decay) for name, m in METHODS.items() if problem in m.learning_rates for decay in m.decays]
    assert [(row["method"], row["lr decay"] == "yes") for row in rows] == expected
    for row in rows:
        assert row["curve"]["loss"][-1] < row["curve"]["loss"][0], row["method"]


def test_orthogonalization(tmp_path: Path) -> None:
    orthogonalization.main(["--quick", "--device", "cpu", "--results", str(tmp_path)])
    rows = record(tmp_path / "orthogonalization-cpu.json")["rows"]
    methods = {orthogonalization.METHODS[row["method"]].orthogonalizer for row in rows}
    assert methods == set(get_args(OrthogonalizerName))
    for row in rows:
        assert isfinite(row["× newton_schulz"])
        if row["method"] in {"qdwh", "zolo_pd", "svd"}:
            accurate = 1e-13 if row["precision"] == "float64" else 1e-5
            errors = [row[f"{e}, {s}"] for s in orthogonalization.SPECTRA for e in ("orthogonality", "backward")]
            assert max(errors) <= accurate, row


@pytest.mark.slow  # seconds in a tiny form; the parts it measures have their own tests
def test_optimizer_step(tmp_path: Path) -> None:
    optimizer_step.main(["--quick", "--peers", "--device", "cpu", "--results", str(tmp_path)])
    rows = {row["optimizer"]: row for row in record(tmp_path / "optimizer_step-tiny-cpu.json")["rows"]}
    assert {optimizer_step.REFERENCE, *optimizer_step.PRESETS} < set(rows)
    assert all(row["ms"] > 0 for row in rows.values())
    # Muon keeps one moment of each matrix, AdamW two of each parameter.
    ours, adamw = rows["ours"]["state MB"], rows["torch AdamW alone"]["state MB"]
    assert ours == pytest.approx(rows[optimizer_step.REFERENCE]["state MB"])
    assert ours < 0.7 * adamw


@pytest.mark.slow  # seconds in a tiny form; the parts it measures have their own tests
def test_optimizer_state(tmp_path: Path) -> None:
    optimizer_state.main(["--quick", "--device", "cpu", "--results", str(tmp_path)])
    rows = {row["optimizer"]: row for row in record(tmp_path / "optimizer_state-cpu.json")["rows"]}
    assert set(rows) == {optimizer_state.ADAMW, *optimizer_state.OPTIONS}
    shares = {name: row["× AdamW's state"] for name, row in rows.items()}
    assert rows[optimizer_state.ADAMW]["bytes per parameter"] == pytest.approx(8, rel=0.01)
    # The momentum of a matrix takes half of AdamW's state, its codes an eighth, and their scales a little.
    assert shares["int8"] <= 0.30
    assert shares["bfloat16"] == pytest.approx(shares["MuonAdamW"] / 2, rel=0.01)
    assert shares["NorMuon"] <= shares["MuonAdamW"] + 0.02


@pytest.mark.slow  # a quarter of a minute; what it measures is tested in tests/optim/sharding
def test_traffic(tmp_path: Path) -> None:
    traffic.main(["--quick", "--results", str(tmp_path)])
    rows = record(tmp_path / "traffic-cpu.json")["rows"]
    assert {row["strategy"] for row in rows} == set(traffic.WAYS)
    for row in rows:
        if row["strategy"] == "fsdp2":  # matrices whose rows divide, shared out evenly
            # And a number with each piece, which says whether its gradient is zero.
            assert row["MB sent by a rank"] == pytest.approx(row["there and back, W ranks, MB"], rel=1e-4)


@pytest.mark.slow  # seconds in a tiny form; the parts it measures have their own tests
def test_saving_time(tmp_path: Path) -> None:
    arguments = ["--quick", "--results", str(tmp_path)]
    run = run_module("benchmarks.saving_time", *arguments, folder=tmp_path, path=[REPOSITORY])
    assert run.returncode == 0, run.stderr
    rows = record(tmp_path / "saving_time-cpu.json")["rows"]
    assert len(rows) == 7
    assert all(0 < row["training stops, s"] <= row["complete after, s"] for row in rows)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_that_of_the_loss(name: str) -> None:
    """Up to a factor, since the losses are shown relative to something; so slopes along two directions are compared."""
    problem: Problem = PROBLEMS[name](0)
    start, batches = problem.start(), 10 if name == "logistic" else 1

    def slopes(directions: list[Tensor]) -> tuple[float, float]:
        """From the gradients, and from the loss."""
        gradients = [problem.gradients(start, step) for step in range(batches)]
        inner = sum(float((g * d).sum()) for one in gradients for g, d in zip(one, directions, strict=True))
        ahead, behind = ([s + t * d for s, d in zip(start, directions, strict=True)] for t in (1e-2, -1e-2))
        return inner, problem.loss(ahead) - problem.loss(behind)

    # Of about the size of the matrices: the loss of the logistic problem has the seven digits of float32.
    downhill = [g * (s.norm() / g.norm()) for s, g in zip(start, problem.gradients(start, batches), strict=True)]
    outwards, towards = slopes(start), slopes(downhill)
    assert outwards[0] / towards[0] == pytest.approx(outwards[1] / towards[1], rel=0.1 if batches > 1 else 1e-3)


def test_two_steps_of_qdwh_leave_singular_values_below_one(polar: Callable[[Tensor], Tensor]) -> None:
    matrix = torch.randn(50, 20, dtype=torch.float64)
    stopped = two_qdwh_steps(matrix)
    values = torch.linalg.svdvals(stopped)
    assert 0.6 < values.min() < 0.95
    assert values.max() <= 1 + 1e-12
    # The singular vectors are those of the polar factor: OᵀP is symmetric.
    product = stopped.mT @ polar(matrix)
    torch.testing.assert_close(product, product.mT)


@pytest.fixture
def polar() -> Callable[[Tensor], Tensor]:
    def compute(matrix: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        factor: Tensor = u @ vh
        return factor

    return compute


@pytest.mark.slow  # seconds in a tiny form; the parts it measures have their own tests
def test_monitors(tmp_path: Path) -> None:
    monitors.main(["--quick", "--results", str(tmp_path)])
    rows = {row["monitor"]: row["ms in 10 steps"] for row in record(tmp_path / "monitors-cpu.json")["rows"]}
    names = {name for name in callbacks.__all__ if name[0].isupper()}
    watching = {name for name in names if rows.get(name, 0.0) > 0.0}
    others = {"HyperparameterSchedule", "NonFiniteError", "ParameterSummary", "PredictionWriter", "QKClip"}
    assert watching == names - others - {"StepProgressBar", "TargetBatch"}
    assert rows["sum of these"] == pytest.approx(sum(rows[name] for name in watching))
    assert rows["sum of these"] < rows["the steps themselves"]


@pytest.mark.slow  # ten seconds; the variants are presets, which tests/template trains
def test_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(variants.VARIANTS)
    monkeypatch.setattr(variants, "VARIANTS", {name: variants.VARIANTS[name] for name in (names[0], names[-2])})
    variants.main(["--quick", "--results", str(tmp_path)])
    rows = record(tmp_path / "variants-cpu.json")["rows"]
    losses = [row["losses"] for row in rows]
    assert len({tuple(values) for values in losses}) == 2  # the variant acts
    assert [row["gain"] for row in rows] == [f"{losses[0][0] - values[0]:+.4f}" for values in losses]


@pytest.mark.slow  # half a minute: five runs that are long enough to be judged
def test_sick_runs(tmp_path: Path) -> None:
    """Each preset of configs/experiment is judged by what it is for."""
    sick_runs.main(["--quick", "--results", str(tmp_path), "--images", str(tmp_path / "images")])
    rows = {row["run"]: row for row in record(tmp_path / "sick_runs-cpu.json")["rows"]}
    assert rows.keys() == sick_runs.RUNS.keys()
    assert rows["healthy"]["verdict"] in {"ok", "watch: warnings"}
    assert rows["large_weights"]["verdict"] in {"watch: output_rms", "bad: output_rms"}  # bad a few steps later
    assert rows["lost_rank"]["verdict"].endswith(": orthogonality_error")
    assert rows["rates_apart"]["verdict"] == "bad: rate_ratio"
    assert rows["steered"]["weight RMS, mean, final"] < rows["large_weights"]["weight RMS, mean, final"] / 3
    assert {path.stem for path in (tmp_path / "images").iterdir()} == {"curves", *(f"health-{name}" for name in rows)}


@pytest.mark.filterwarnings("ignore")
def test_routing_corpus(tmp_path: Path) -> None:
    routing_corpus.main(["--quick", "--results", str(tmp_path)])
    plain, together = record(tmp_path / "routing_corpus-cpu.json")["rows"]
    assert plain == together | {"library": "plain"}
    verdicts = ("right", "guessed", "wrong with a warning", "wrong")
    for unit in ("elements", "parameters"):
        assert sum(plain[f"{verdict}, {unit}"] for verdict in verdicts) == plain[unit] > 0


def test_what_logged_steps_are_longer_by() -> None:
    """Compared with the eight before the last one, in turns of either kind."""
    watched = turns.Turns([], turn=10)
    for turn in range(4):
        extra = 0.5 if turn % 2 == 0 else 0.125
        watched.steps += [turns.Step(turn % 2 == 0, False, 1.0 + turn)] * 8
        watched.steps += [
            turns.Step(turn % 2 == 0, False, 9.0),
            turns.Step(turn % 2 == 0, True, 1.0 + turn + extra),
        ]
    assert watched.longer_by(True) == [0.5, 0.5]
    assert watched.longer_by(False) == [0.125, 0.125]
    low, high = turns.interval([0.5] * 20, [0.125] * 20)
    assert low == high == 0.375
    assert turns.trimmed_mean([*[1.0] * 18, -50.0, 70.0]) == 1.0
