"""Test the networks, and that the table decides their sizes: in training, from a checkpoint, and in routes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.cli import MuonCLI
from lightning_muon.optim import find_routes
from {{ cookiecutter.package_name }}.data import TableData
from {{ cookiecutter.package_name }}.model import MLP, FTTransformer
from {{ cookiecutter.package_name }}.module import TableModule

Run = Callable[..., MuonCLI]
NETWORKS = [FTTransformer, MLP]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("numbers", "categories"), [(3, [4, 2]), (3, []), (0, [4])])
def test_every_feature_counts(network: Callable[..., nn.Module], numbers: int, categories: list[int]) -> None:
    torch.manual_seed(0)
    net = network(numbers, categories, outputs=2, dim=16, depth=2).eval()
    nn.init.normal_(net.get_submodule("head").weight)  # type: ignore[arg-type]
    x, c = torch.randn(5, numbers), torch.randint(1, 2, (5, len(categories)))
    before = net(x, c)
    assert before.shape == (5, 2)
    for column in range(numbers):
        changed = x.clone()
        changed[:, column] += 1
        assert (net(changed, c) - before).abs().amax(dim=1).min() > 1e-4
    for column in range(len(categories)):
        changed = c.clone()
        changed[:, column] = 0
        assert (net(x, changed) - before).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("network", NETWORKS)
def test_no_route_is_a_guess_and_features_are_embeddings(network: Callable[..., nn.Module]) -> None:
    routes = {route.name: route for route in find_routes(network(5, [4], 1, dim=16), strict=True)}
    of_features = [route for name, route in routes.items() if name.startswith(("tokenizer", "tables"))]
    assert of_features
    assert {route.algorithm for route in of_features} == {"adamw"}
    assert routes["head.weight"].role == "head"
    assert {route.algorithm for name, route in routes.items() if "blocks" in name and route.shape.numel() > 64} == {
        "muon"
    }


@pytest.mark.parametrize(("name", "value"), [("dim", 0), ("depth", 0), ("heads", 0), ("heads", 3)])
def test_sizes_that_cannot_work_are_refused(name: str, value: int) -> None:
    sizes: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        FTTransformer(1, [], 1, **sizes)


def test_it_learns_and_predicts_rows_without_a_target(run: Run, tmp_path: Path) -> None:
    metrics = run("fit", "--trainer.max_steps=60").trainer.callback_metrics
    assert metrics["val/accuracy"] > 0.8
    assert metrics["val/auroc"] > 0.9
    (tmp_path / "new.csv").write_text("colour,width,length\ngreen,0.1,0.9\nred,0.9,?\n")
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    # Without the options of the training: the checkpoint has what the table said.
    alone = ["--data.files=null", "--data.target=null"]
    predicted = run("predict", f"--ckpt_path={checkpoint}", "--data.predict=new.csv", *alone)
    (rows,) = predicted.trainer.predict_loop.predictions
    assert [(row["row"], row["prediction"]) for row in rows] == [(1, "long"), (2, "wide")]
    assert all(0.5 <= row["probability"] <= 1 for row in rows)
    run("test", f"--ckpt_path={checkpoint}")
    loaded = TableModule.load_from_checkpoint(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(predicted.model.parameters(), loaded.parameters(), strict=True))


def test_a_number_is_predicted_in_its_own_units(run: Run, tmp_path: Path) -> None:
    lines = ["a,b,price", *(f"{i % 7},{i % 5},{1000 + 100 * (i % 7) + 10 * (i % 5)}" for i in range(200))]
    (tmp_path / "prices.csv").write_text("\n".join(lines))
    fitted = run("fit", "--data.files=prices.csv", "--data.target=price", "--trainer.max_steps=60")
    metrics = fitted.trainer.callback_metrics
    assert metrics["val/r2"] > 0.9
    deviation = fitted.datamodule.encoding.target_std
    assert metrics["val/rmse"] == pytest.approx(deviation * float(metrics["val/loss"]) ** 0.5, rel=1e-3)
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    alone = ["--data.files=prices.csv", "--data.target=price"]
    predicted = run("predict", f"--ckpt_path={checkpoint}", *alone)
    rows = [row for batch in predicted.trainer.predict_loop.predictions for row in batch]
    assert all(900 < row["prediction"] < 1800 for row in rows)
    rough = run("validate", f"--ckpt_path={checkpoint}", *alone, "--trainer.precision=bf16-true")
    in_half = float(rough.trainer.callback_metrics["val/rmse"])
    assert in_half == pytest.approx(float(metrics["val/rmse"]), rel=0.2)


def test_routes_know_the_table(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("routes", "--every-parameter")
    assert ended.value.code == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    found = {row[4].strip(): (row[1].strip(), row[5].strip()) for row in rows if len(row) > 5}
    assert found["net.tokenizer.weight"] == ("adamw", "2×16")
    assert found["net.tokenizer.tables.0.weight"] == ("adamw", "3×16")
    assert found["net.head.weight"] == ("adamw", "2×16")
    assert found["net.blocks.1.out.weight"] == ("muon", "16×16")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--data.target=sort", "table/rows.csv: there is no column 'sort', but 'length', 'width', 'colour', 'kind'"),
        ("--model.net.heads=3", "dim (16) must be a multiple of the number of heads (3)"),
    ],
)
def test_a_mistake_is_one_line(run: Run, capsys: pytest.CaptureFixture[str], option: str, line: str) -> None:
    with pytest.raises(SystemExit):
        run("fit", option)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {line}")


@pytest.mark.parametrize("dataset", ["friedman", "breast_cancer", "wine", "diabetes"])
def test_data_sets_are_there(dataset: Any) -> None:
    data = TableData(dataset=dataset)
    assert data.numbers >= 10
    assert data.outputs == {"breast_cancer": 2, "wine": 3}.get(dataset, 1)
