"""Projects of the tasks table and bare: they train with all monitors, resume, validate and predict."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.report import compare
from tests.processes import launch, run_module

PROGRAM = Path(__file__).with_name("task_training.py")
needs_tables = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("pyarrow", "sklearn")), reason="pyarrow or scikit-learn is missing"
)
TASKS = [pytest.param("table", marks=needs_tables), "bare"]

Bake = Callable[[str], Path]


@pytest.fixture
def copy_of(project_of: Bake, tmp_path: Path) -> Bake:
    """`copy_of(task)`: a project that a test may write into."""
    return lambda task: shutil.copytree(project_of(task), tmp_path / task)


def write_houses(folder: Path) -> None:
    lines = [f"{i % 7},{i * i % 97},{'old' if i % 3 else 'new'},{i % 7 * 10 + i % 3}.5" for i in range(100)]
    (folder / "houses.csv").write_text("\n".join(["rooms,garden,state,price", *lines]))


def train(project: Path, classes: tuple[str, str], options: list[str], predict: list[str]) -> dict[str, Any]:
    found: dict[str, Any]
    arguments = (classes, options, predict)
    (found,) = launch(PROGRAM, "train", 1, *arguments, folder=project, path=[project / "src"])
    assert found["steps"] == [4, 6, 6]
    assert found["same"]
    assert "Who updates what" in found["table"]
    return found


def test_a_bare_project_trains(copy_of: Bake) -> None:
    found = train(copy_of("bare"), ("Module", "Data"), [], [])
    assert {"val/loss", "val/accuracy", "watch/weight_rms/max", "watch/orthogonality_error/mean"} <= found[
        "metrics"
    ].keys()
    assert {row["class"] for row in found["predictions"][0]} <= set(range(4))
    assert {name for name, role in found["roles"].items() if role == "matrix"} >= {"net.blocks.0.1.weight"}


@needs_tables
def test_a_table_decides_the_sizes_of_the_network(copy_of: Bake) -> None:
    project = copy_of("table")
    write_houses(project)
    (project / "new.csv").write_text("state,rooms,garden\nold,3,10\nolder,,20\n")
    options = ["--data.files=houses.csv", "--data.target=price"]
    found = train(project, ("TableModule", "TableData"), options, ["--data.predict=new.csv"])
    assert {"val/loss", "val/rmse", "val/mae", "val/r2", "watch/weight_rms/max"} <= found["metrics"].keys()
    assert found["roles"]["net.tokenizer.weight"] == "embedding"
    assert found["roles"]["net.tokenizer.tables.0.weight"] == "embedding"
    assert found["roles"]["net.head.weight"] == "head"
    (rows,) = found["predictions"]
    assert [row["row"] for row in rows] == [1, 2]
    assert all(0 < row["prediction"] < 70 for row in rows)  # in the units of the price
    assert "net.tokenizer.weight" in found["table"]
    assert "TableModule: 44 parameters" in found["routes"]


@pytest.mark.slow  # the whole runs
@pytest.mark.parametrize("task", TASKS)
def test_the_default_run_is_healthy(copy_of: Bake, task: str, tmp_path: Path) -> None:
    project = copy_of(task)
    options = [f"--trainer.logger.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    finished = run_module("my_muon_project", "fit", *options, folder=project, path=[project / "src"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    comparison = compare([tmp_path], 1)
    # Not the share of the optimizer's time: other programs run beside this one.
    assert [text for text in comparison.advice(0) if "share of the step" not in text] == []
    figures = {line.label: figure[0].value for line, figure in comparison.lines if figure[0]}
    assert float(figures["val/loss, final"]) < {"table": 0.06, "bare": 0.2}[task]


@needs_tables
@pytest.mark.slow  # three launches
def test_a_network_that_the_table_decides_is_sharded(copy_of: Bake) -> None:
    """Two ranks under FSDP2 and DDP train as one device does, and go on from its checkpoint."""
    project, classes = copy_of("table"), ("TableModule", "TableData")
    write_houses(project)
    common = ["--data.files=houses.csv", "--data.target=price", "--model.net.dropout=0", "--trainer.callbacks=null"]
    common += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.limit_val_batches=0"]
    common += [
        "--trainer.enable_progress_bar=false",
        "--trainer.max_steps=3",
        "--model.optimizer=SGD",
        "--model.optimizer.lr=0.1",
        "--trainer.default_root_dir={}",
    ]

    def fit(folder: str, *options: str) -> list[str]:
        return ["fit", *(option.format(folder) for option in common), *options]

    launch(PROGRAM, "ranks", 1, classes, fit("one", "--data.batch_size=8"), folder=project, path=[project / "src"])
    two = ["--data.batch_size=4", "--trainer.devices=2"]
    runs = [fit(name, *two, f"--config=configs/strategy/{name}.yaml") for name in ("fsdp2", "ddp")]
    launch(PROGRAM, "ranks", 2, classes, *runs, folder=project, path=[project / "src"], process_group=False)

    def weights(folder: str) -> dict[str, torch.Tensor]:
        (path,) = (project / folder).rglob("*.ckpt")
        if path.is_dir():
            run_module(
                "my_muon_project", "consolidate", str(path), f"{folder}.ckpt", folder=project, path=[project / "src"]
            )
            path = project / f"{folder}.ckpt"
        loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
        return loaded

    expected = weights("one")
    for folder in ("fsdp2", "ddp"):
        for name, value in weights(folder).items():
            text = f"{name} of {folder}"
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=text)
