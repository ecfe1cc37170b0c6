"""Tables become tensors by what their training part says, and what is wrong in them is told by its place."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_muon.data import TableBatch, TableDataModule, TableEncoding

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *lines: str) -> str:
    Path(name).write_text("\n".join(lines) + "\n")
    return name


def houses(name: str = "houses.csv", rows: int = 100) -> str:
    lines = [f"{i % 7},{'old' if i % 3 else 'new'},{i % 2 == 0},{i % 7 * 10 + i % 3}.5" for i in range(rows)]
    return write(name, "rooms,state,garden,price", *lines)


def encoded(module: TableDataModule, split: str) -> TableBatch:
    module.batch_size = 1000
    loader = {"train": module.train_dataloader, "val": module.val_dataloader, "test": module.test_dataloader}[split]()
    (batch,) = loader
    return TableBatch(*(values[batch.row.argsort()] for values in batch)) if split == "train" else batch


def small(*lines: str, val: tuple[str, ...] | None = None, **options: Any) -> TableDataModule:
    """A module of one table for training, and the same or another one for validation."""
    write("train.csv", *lines)
    write("val.csv", *(lines if val is None else val))
    return TableDataModule({"train": "train.csv", "val": "val.csv"}, **{"target": "y", **options})


def test_numbers_are_standardized_by_the_training_part_and_texts_are_numbered() -> None:
    module = small("a,c,y", "1,x,0.5", "2,x,1.5", "3,z,2.5", "4,z,3.5", val=("c,y,a,more", "z,9.5,2.5,?", "q,2,5,1"))
    train, val = encoded(module, "train"), encoded(module, "val")
    assert module.encoding.numbers == {"a": (2.5, 1.25**0.5)}
    assert (module.numbers, module.categories, module.outputs) == (1, [3], 1)
    assert train.numbers.mean().item() == pytest.approx(0, abs=1e-6)
    assert train.numbers.std(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(val.numbers, torch.tensor([[0.0], [2.5 / 1.25**0.5]]))
    assert val.categories.tolist() == [[2], [0]]  # a text that training has not is unknown
    assert val.target.tolist() == pytest.approx([(9.5 - 2) / 1.25**0.5, 0])
    assert val.row.tolist() == [1, 2]


def test_what_is_missing_is_the_mean_and_marked() -> None:
    module = small("a,b,c,y", "1,5,x,1", "?,5,x,2", "3,5,,3", ",5,NA,4.5", val=("a,b,c,y", "nan,,,1"))
    train, val = encoded(module, "train"), encoded(module, "val")
    assert module.encoding.numbers == {"a": (2.0, 1.0), "b": (5.0, 1.0)}  # b is constant
    assert train.numbers.tolist() == [[-1, 0, -1], [0, 0, 1], [1, 0, -1], [0, 0, 1]]
    assert val.numbers.tolist() == [[0, 0, 1]]
    assert module.encoding.categories == {"c": ["", "x"]}
    assert val.categories.tolist() == [[1]]


def test_a_text_that_occurs_once_is_unknown_and_a_column_of_such_texts_is_told() -> None:
    module = small("name,c,y", "Ann,x,1", "Bob,x,2", "Cem,z,3.5")
    with pytest.warns(UserWarning, match=r"train.csv: each text occurs once in 'name'.*--data.ignore\+=name"):
        assert module.encoding.categories == {"name": [], "c": ["x"]}
    assert small("name,c,y", "Ann,x,1", "Bob,x,2.5", ignore=["name"]).encoding.categories == {"c": ["x"]}


def test_dates_are_numbers_and_codes_may_be_categories() -> None:
    lines = ("born,plz,y", "2000-01-02,01234,a", "2000-01-04 12:00:00,01234,b", "1999-12-31,99999,a")
    assert list(small(*lines).encoding.numbers) == ["born", "plz"]
    found = small(*lines, categorical=["plz"]).encoding
    assert found.categories == {"plz": ["01234"]}
    assert found.numbers["born"][0] == pytest.approx(10957 + (1 + 3.5 - 1) / 3)


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (["no", "yes", "no"], "classification", ["no", "yes"]),
        (["true", "false", "true"], "classification", ["false", "true"]),
        (["10", "2", "2"], "classification", ["2", "10"]),
        (["1.5", "2", "2"], "regression", []),
        ([*map(str, range(11))], "regression", []),
    ],
)
def test_a_target_of_texts_or_of_few_whole_numbers_has_classes(
    values: list[str], kind: str, classes: list[str]
) -> None:
    lines = ["x,y", *(f"{i},{value}" for i, value in enumerate(values))]
    assert (small(*lines).encoding.kind, small(*lines).encoding.classes) == (kind, classes)
    other = small("x,y", "1,1", "2,2", kind="regression").encoding
    assert (other.kind, other.target_mean, other.target_std) == ("regression", 1.5, 0.5)


def test_each_row_is_in_one_split_always_the_same_and_classes_are_alike() -> None:
    lines = [f"{i},{'rare' if i % 10 == 0 else 'usual'}" for i in range(400)] + ["7,once"]
    write("a.csv", "x,y", *lines)
    parts = {}
    for seed in (0, 1):
        module = TableDataModule("a.csv", target="y", seed=seed)
        parts[seed] = {split: sorted(encoded(module, split).row.tolist()) for split in ("train", "val", "test")}
    assert parts[0] == parts[1]
    assert sorted(chain.from_iterable(parts[0].values())) == list(range(1, 402))
    assert [round(len(rows), -1) for rows in parts[0].values()] == [280, 60, 60]
    for rows in parts[0].values():
        assert sum(row % 10 == 1 for row in rows) / len(rows) == pytest.approx(0.1, abs=0.02)
    assert 401 in parts[0]["train"]  # the only row of its class
    houses()
    prices = [encoded(TableDataModule("houses.csv", target="price"), split).target for split in ("train", "val")]
    assert abs(prices[1].mean()) < 0.25
    assert abs(prices[1].std() - 1) < 0.25


def test_parquet_files_are_read_as_csv_files_are() -> None:
    houses()
    columns = {
        "rooms": pa.array([i % 7 for i in range(100)], pa.int32()),
        "state": pa.array(["old" if i % 3 else "new" for i in range(100)]).dictionary_encode(),
        "garden": [i % 2 == 0 for i in range(100)],
        "price": [i % 7 * 10 + i % 3 + 0.5 for i in range(100)],
    }
    for part in (0, 1):
        pq.write_table(pa.table(columns).slice(50 * part, 50), f"part{part}.parquet")
    one, other = TableDataModule("houses.csv", target="price"), TableDataModule("part*.parquet", target="price")
    assert one.encoding.numbers == other.encoding.numbers
    for first, second in zip(encoded(one, "val")[:3], encoded(other, "val")[:3], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_delimiters_quotes_and_marks_of_other_programs_are_taken(delimiter: str) -> None:
    text = '\ufeff"a b",y\n"1",x\n 2 ,"x"\n3,"z, z"\n'.replace(",", delimiter)
    Path("a.csv").write_text(text, encoding="utf-8")
    found = TableDataModule({"train": "a.csv"}, target="y").encoding
    assert list(found.numbers) == ["a b"]
    assert found.classes == ["x", f"z{delimiter} z"]


WRONG: list[tuple[tuple[str, ...], tuple[str, ...] | None, dict[str, Any], str]] = [
    (("a,y", "1,2"), None, {"target": "z"}, "train.csv: there is no column 'z', but 'a', 'y'"),
    (("a,y", "1,2"), None, {"target": None}, "--data.target: say which column is to be predicted"),
    (("a,y", "1,2.5", "2,2.5"), None, {}, "train.csv: the target 'y' is always 2.5: nothing to learn"),
    (("a,y", "1,b", "2,b"), None, {}, "train.csv: the target 'y' is always 'b': nothing to learn"),
    (("a,y", "1,2.5", "2,", "3,?"), None, {}, "train.csv, column 'y', row 2: the target has no value, and in 1 more"),
    (("a,y", "1,", "2,"), None, {}, "train.csv: the target 'y' has no value"),
    (("y", "1", "2"), None, {}, "train.csv: there is no column beside the target 'y'"),
    (("a,b,y", ",1,1", "?,2,2"), None, {}, "train.csv: the column 'a' has no value; leave it out: --data.ignore+=a"),
    (("a,y", "1,1", "2,2", "two,3"), None, {}, "train.csv, column 'a', row 3: 'two' is no number, but most values are"),
    (("a,y", "1,1", "inf,2", "3,3"), None, {}, "train.csv, column 'a', row 2: 'inf' is no number"),
    (("a,y", "1,1", "2"), None, {}, "train.csv: CSV parse error: Row #3: Expected 2 columns, got 1: 2"),
    (("a,a,y", "1,1,1"), None, {}, "train.csv: there are two columns 'a'"),
    (("a,y",), None, {}, "train.csv has no rows"),
    (("a,y", "1,1", "2,2"), None, {"ignore": ["b"]}, "train.csv: there is no column 'b', but 'a', 'y'"),
    (("a,y", "1,1", "2,2"), None, {"categorical": ["y"]}, "train.csv: the column 'y' is the target"),
    (("a,b,y", "1,1,1", "2,2,2"), ("a,y", "1,2"), {}, "val.csv: there is no column 'b', but 'a', 'y'"),
    (("a,y", "1,1", "2,2"), ("a,y", "1,1", "x,2"), {}, "val.csv, column 'a', row 2: 'x' is no number"),
    (("a,y", "1,k", "2,l"), ("a,y", "1,k", "1,m"), {}, "val.csv, column 'y', row 2: the class 'm' is not in the tra"),
    (("a,y", "1,k", "2,l"), ("a,y", "1,"), {}, "val.csv, column 'y', row 1: the target has no value"),
]


@pytest.mark.parametrize(("train", "val", "options", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_told_by_file_column_and_row(
    train: tuple[str, ...], val: tuple[str, ...] | None, options: dict[str, Any], message: str
) -> None:
    module = small(*train, val=val, **options)
    with pytest.raises(ValueError, match=r".") as raised:
        module.setup("fit")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_a_table_are_told() -> None:
    Path("empty.csv").touch()
    Path("broken.parquet").write_text("no parquet")
    Path("latin.csv").write_bytes("a,y\nä,1\n".encode("latin-1"))
    for name, message in {
        "empty.csv": "empty.csv is empty",
        "broken.parquet": "broken.parquet: .*Parquet magic bytes not found",
        "latin.csv": "latin.csv: .*invalid UTF8",
        "none.csv": "--data.files none.csv: no file matches in",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            TableDataModule(name, target="y").setup("fit")
    with pytest.raises(ValueError, match=r"--data.files: 'dev' is no split; there are train, val, test"):
        TableDataModule({"train": "a.csv", "dev": "b.csv"})
    write("a.csv", "a,y", "1,1.5", "2,2")
    with pytest.raises(ValueError, match=r"a.csv: 2 rows are too few: none is left for "):
        TableDataModule("a.csv", target="y").setup("fit")
    with pytest.raises(ValueError, match=r"--data.files: there are files of train, but none of val"):
        TableDataModule({"train": "a.csv"}, target="y").setup("fit")


def test_a_checkpoint_has_the_encoding_for_files_without_a_target() -> None:
    module = small("a,c,y", "1,x,no", "2,x,yes", "3,z,no")
    _ = module.train_dataloader()
    torch.save(module.state_dict(), "state.pt")
    other = TableDataModule(predict=write("new.csv", "c,a", "x,2", "q,"))
    other.load_state_dict(torch.load("state.pt", weights_only=True))
    assert other.encoding == module.encoding
    assert isinstance(other.encoding, TableEncoding)
    (batch,) = other.predict_dataloader()
    assert batch.numbers.tolist() == [[0], [0]]
    assert batch.categories.tolist() == [[1], [0]]
    assert batch.target.tolist() == [-1, -1]


def test_a_stop_in_mid_epoch_changes_nothing(fit: Any) -> None:
    import lightning.pytorch as pl

    class Linear(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(1, 1)
            self.rows: list[int] = []

        def training_step(self, batch: TableBatch, batch_idx: int) -> torch.Tensor:
            self.rows += batch.row.tolist()
            return (self.layer(batch.numbers)[:, 0] - batch.target).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def data() -> TableDataModule:
        return TableDataModule(houses(), target="price", batch_size=8)

    straight, first, second = Linear(), Linear(), Linear()
    fit(straight, train_dataloaders=data(), max_steps=18, max_epochs=-1)
    trainer = fit(first, train_dataloaders=data(), max_steps=5, max_epochs=-1)
    trainer.save_checkpoint("half.ckpt")
    fit(second, train_dataloaders=data(), max_steps=18, max_epochs=-1, ckpt_path="half.ckpt")
    assert first.rows + second.rows == straight.rows
    assert torch.equal(second.layer.weight, straight.layer.weight)
