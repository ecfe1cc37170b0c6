"""The small trainings: the sweep, the comparison, and that each task runs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.small_trainings import __main__ as small_trainings
from benchmarks.small_trainings import fine_tuning, structures, training, vision
from benchmarks.small_trainings.training import Result, Task
from lightning_muon.optim import find_routes


@pytest.mark.parametrize(
    ("best", "first"), [(0.002, (0.001, 0.002, 0.004)), (0.03, (0.001, 0.002)), (1e-3, (0.1, 0.2))]
)
def test_a_sweep_goes_on_until_the_best_is_not_at_an_end(best: float, first: tuple[float, ...]) -> None:
    """With losses that are a parabola of the logarithm of the rate, and infinite above ten times the best."""
    found = training.swept(lambda lr: math.inf if lr > 10 * best else math.log(lr / best) ** 2, first)
    rates, losses = list(found), list(found.values())
    assert rates == sorted(rates)
    assert 0 < losses.index(min(losses)) < len(rates) - 1
    assert abs(math.log2(rates[losses.index(min(losses))] / best)) <= 0.5
    assert set(first) <= set(rates)


def test_a_sweep_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="at an end of"):
        training.swept(lambda lr: lr)


def test_a_difference_within_the_interval_is_none() -> None:
    """Against Student's t: means 2 and 1, three values each with a deviation of s."""
    for deviation, expected in ((0.1, "B better"), (1.0, "no difference")):
        a, b = (Result(name, {1.0: 0.0}, [m - deviation, m, m + deviation]) for name, m in (("A", 2.0), ("B", 1.0)))
        difference, half = training.gain(a, b)
        assert difference == pytest.approx(1.0)
        assert half == pytest.approx(2.776 * deviation * math.sqrt(2 / 3), rel=1e-3)
        assert training.verdict(a, b) == expected
        if deviation == 0.1:
            assert training.verdict(b, a) == "B better"


def quadratic(target: float) -> Task:
    """One weight, which is pulled to the target."""

    def loss(model: nn.Module, _: torch.Generator | None = None) -> Tensor:
        return (model.get_parameter("weight") - target).square().sum()

    return Task("quadratic", lambda: nn.Linear(1, 1, bias=False), {None: loss}, lambda m: float(loss(m)), steps=40)


def test_a_training_ends_its_schedule_and_diverges_to_infinity() -> None:
    for name in training.OPTIMIZERS:
        assert training.train(quadratic(0.1), name, 0.1, seed=0) < 1e-2
        assert training.train(quadratic(math.nan), name, 0.1, seed=0) == math.inf
    rates = [training._schedule(step / 100) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert 0 < rates[0] < 0.1
    assert 0 < rates[-1] < 0.02


def test_detection_sees_what_was_drawn() -> None:
    """Where a class is, there are bright pixels; where no object is near, there are none."""
    images, classes, boxes = vision.shapes(64, 3, seed=3, noise=0.0)
    cells = nn.functional.max_pool2d(images, vision.SIDE // vision.CELLS)[:, 0]
    assert (cells[classes >= 0] == 1).all()
    assert boxes[:, 2][classes >= 0].min() >= 0.6
    near = nn.functional.max_pool2d((classes >= 0).float()[:, None], 5, stride=1, padding=2)[:, 0] > 0
    assert not cells[~near].any()
    assert set(classes.unique().tolist()) == {-1, 0, 1, 2}


def test_both_heads_of_the_detector_and_of_the_gan_are_adamws() -> None:
    for task, heads in ((vision.detection(), {"classes", "boxes"}), (structures.gan(), {"generator.6", "critic.6"})):
        routes = {
            route.name.removesuffix(".weight"): route.algorithm for route in find_routes(task.model(), task.rules)
        }
        assert {routes[head] for head in heads} == {"adamw"}
        assert "muon" in routes.values()


def test_the_targets_of_graphs_are_those_of_their_edges() -> None:
    adjacency, targets = structures.graphs(1)
    one = adjacency[5]
    triangles = sum(float(one[i, j] * one[j, k] * one[k, i]) for i in range(16) for j in range(i) for k in range(j))
    assert float(targets[5, 0]) == pytest.approx(math.log1p(triangles) - 2.0, abs=1e-4)
    assert targets.abs().mean() < 1.5


def test_lora_starts_as_the_model_and_trains_nothing_else() -> None:
    torch.manual_seed(0)
    model = fine_tuning.LanguageModel()
    codes = torch.randint(128, (2, 10))
    before = model(codes)
    task = fine_tuning.fine_tuning("LoRA, Muon for B, AdamW for A", model)
    tuned = task.model()
    torch.testing.assert_close(tuned(codes), before)
    algorithms = {route.name: route.algorithm for route in find_routes(tuned, task.rules)}
    assert {name.split(".")[-2] for name, algorithm in algorithms.items() if algorithm == "muon"} == {"lora_B"}
    assert {name.split(".")[-2] for name, algorithm in algorithms.items() if algorithm == "adamw"} == {"lora_A"}
    assert all(parameter.requires_grad for parameter in model.parameters())  # it was copied


def test_the_rules_on_the_page_choose_the_matrices_of_lora() -> None:
    page = Path(__file__).parents[2] / "docs" / "other-models-and-fine-tuning.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {"model": fine_tuning.with_lora(fine_tuning.LanguageModel())}
    exec(block, names)  # noqa: S102 - that is the test
    matrices = {group["algorithm"]: {n.split(".")[-2] for n in group["param_names"]} for group in names["groups"]}
    assert matrices == {"muon": {"lora_B"}, "adamw": {"lora_A"}}
    routes = find_routes(names["model"], names["neither"])
    assert {route.algorithm for route in routes if "lora" in route.name} == {"adamw"}


@pytest.mark.slow  # seconds in a tiny form; the parts it measures have their own tests
def test_all_tasks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_trainings, "QUICK_STEPS", 2)
    small_trainings.main(["--quick", "--only", *small_trainings.TASKS, "--results", str(tmp_path)])
    record = json.loads((tmp_path / "small_trainings-cpu.json").read_text())
    assert record["settings"]["quick"]
    rows = {row["task"]: row for row in record["rows"]}
    assert set(rows) == {"detection", "diffusion", "graph", "GAN", "tabular transformer"}
    for row in rows.values():
        assert row["in Muon, %"] > 80
        assert row["AdamW losses"] != row["MuonAdamW losses"]
        assert all(math.isfinite(loss) for loss in row["AdamW losses"] + row["MuonAdamW losses"])


def test_one_task_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "small_trainings-cpu.json"
    path.write_text(json.dumps({"rows": [{"task": "graph", "gain": "old"}, {"task": "diffusion", "gain": "old"}]}))
    small_trainings.main(["--quick", "--only", "graph", "--results", str(tmp_path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["task"], row["gain"] == "old") for row in rows] == [("diffusion", True), ("graph", False)]


@pytest.mark.slow  # seconds in a tiny form; the parts it measures have their own tests
def test_fine_tuning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tuning, "PYTHON_BYTES", 50_000)
    monkeypatch.setattr(fine_tuning, "HELD_OUT_ROWS", 10)
    monkeypatch.setattr(fine_tuning, "DEPTH", 1)
    ways = {way: fine_tuning.WAYS[way] for way in ("all weights, AdamW", "LoRA, AdamW", "LoRA, Muon for A and B")}
    monkeypatch.setattr(fine_tuning, "WAYS", ways)
    small_trainings.main(["--quick", "--only", "fine_tuning", "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "small_trainings-fine_tuning.json").read_text())["rows"]
    assert [(row["pretrained by"], row["fine-tuned"]) for row in rows] == [
        (optimizer, way) for optimizer in training.OPTIMIZERS for way in ways
    ]
    for row in rows:
        assert (row["against AdamW"] is None) == row["fine-tuned"].endswith(", AdamW")
        assert float(row["after"]) < float(row["before"])
