"""Predictions become one file: a row for each sample, in order, each once, whole or not at all."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_muon.callbacks import PredictionWriter
from tests.callbacks.predictions import QUIET, Numbers, Rows, predict
from tests.processes import launch

PROGRAM = Path(__file__).with_name("predictions.py")


def numbers(file: Path) -> list[float]:
    return [json.loads(line)["number"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_row_for_each_sample(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / f"found{suffix}"
    predict(file, 5, 2)
    expected = [{"number": float(n), "name": f"sample {n}, of many"} for n in range(5)]
    if suffix == ".jsonl":
        assert [json.loads(line) for line in file.read_text().splitlines()] == expected
    else:
        with file.open(newline="") as stream:
            assert [{**row, "number": float(row["number"])} for row in csv.DictReader(stream)] == expected
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert f"predictions: {file} (5 rows)" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="exists already"):
        predict(file, 5, 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_write_one_file(world_size: int, tmp_path: Path) -> None:
    launch(PROGRAM, "run", world_size, tmp_path, world_size, process_group=False)
    for strategy in ("ddp", "fsdp2"):
        for count in (7, world_size + 1, 1):
            assert numbers(tmp_path / f"{strategy}-{count}.jsonl") == list(range(count)), (strategy, count)


class Other(Rows):
    """It returns something else."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.found


def write(found: Any, file: Path, count: int = 1) -> None:
    trainer = Trainer(callbacks=[PredictionWriter(file)], **QUIET)
    trainer.predict(Other(found), datamodule=Numbers(count, count), return_predictions=False)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            torch.zeros(2),
            "of Other returns a list of dictionaries, one for each sample; it returned Tensor",
        ),
        ([torch.zeros(2)], "it returned a list with a Tensor"),
        ([{"a": 1}], "predict_step of Other returned 1 rows for 2 samples"),
    ],
)
def test_what_has_no_rows_is_refused(found: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(found, tmp_path / "found.csv", count=2)
    assert not list(tmp_path.iterdir())


def test_values_are_plain_and_columns_are_joined(tmp_path: Path) -> None:
    write({"probabilities": torch.tensor([0.5, 0.25]), "score": float("nan"), "word": "naïve"}, tmp_path / "a.jsonl")
    line = '{"probabilities": [0.5, 0.25], "score": null, "word": "naïve"}\n'
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == line
    write([{"a": 1}, {"b": [1, "x"], "a": None}], tmp_path / "a.csv", count=2)
    assert (tmp_path / "a.csv").read_text() == 'a,b\n1,\n,"[1, ""x""]"\n'


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must end with \.jsonl or \.csv, got 'a\.txt'"):
        PredictionWriter("a.txt")
