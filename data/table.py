"""A data module for tables: one column is to be predicted from the others."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_muon.data.data_module import EpochDataModule
from lightning_muon.data.documents import matching_files
from lightning_muon.data.loader import EpochLoader
from lightning_muon.data.table_encoding import (
    EncodedTable,
    TableEncoding,
    TargetKind,
    as_batch,
    split_rows,
    target_kind,
)
from lightning_muon.data.table_files import Table, read_table, table_of

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
"""The share of each split, where the user gives no files for them."""


class TableDataModule(EpochDataModule):
    """Rows of a table in CSV or Parquet files, as :class:`~lightning_muon.data.TableBatch`.

    All columns but the target are features: numbers and dates are standardized by their mean and deviation in training,
    and missing ones become the mean, marked in a column of their own; texts and boolean values are categories, of which
    those that training has not, or once only, are one. The target of a regression is standardized too. A target of
    texts, or of at most ten different whole numbers, is one of classes.

    This :class:`~lightning_muon.data.TableEncoding` is in the checkpoint, as state of the data module: a run that goes
    on from it, or predicts, uses that of its training.

    Args:
        files: Patterns of files with a header, such as ``houses.csv``; or those of each split, ``{train: …, val: …}``.
            Without the latter, 70 % of the rows are for training, 15 % for validation and 15 % for the test: always the
            same ones.
        target: The column to predict.
        kind: ``regression`` or ``classification``; default: by the values of the target.
        categorical: Columns of categories whose values look like numbers or dates.
        ignore: Columns to leave out.
        predict: A file, with or without the target, for which ``predict`` writes predictions; default: the rows of the
            test.
        batch_size: Rows per batch and device.
        num_workers: Processes that load rows, for each device; rows are in memory, so 0 is fastest.
        seed: Seed of the order of rows.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        files: str | list[str] | dict[str, str | list[str]] | None = None,
        target: str | None = None,
        kind: TargetKind | None = None,
        categorical: list[str] | None = None,
        ignore: list[str] | None = None,
        predict: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if isinstance(files, Mapping) and (unknown := set(files) - set(SHARES)):
            raise ValueError(f"--data.files: {unknown.pop()!r} is no split; there are {', '.join(SHARES)}")
        self.files = files
        self.target = target
        self.kind = kind
        self.categorical = categorical or []
        self.ignore = ignore or []
        self.predict_file = predict
        self._encoding: TableEncoding | None = None
        self._encoded: dict[str, EncodedTable] = {}

    def default_table(self) -> tuple[Mapping[str, Sequence[Any]], str, str]:
        """Return the columns of a table, its name and its target, where ``files`` does not say."""
        raise ValueError("--data.files: say which files the table is in")

    @property
    def encoding(self) -> TableEncoding:
        """What the training part says about the columns; of the checkpoint, if the run goes on from one."""
        if self._encoding is None:
            table, target = self._split("train"), self._target
            kind = self.kind or target_kind(table, target)
            self._take(TableEncoding.of(table, target, kind, self.categorical, self.ignore))
        return cast("TableEncoding", self._encoding)

    def _take(self, encoding: TableEncoding) -> None:
        self._encoding = encoding
        self._encoded = {}
        # For `export`: with it, the exported network can be used on other tables.
        self.save_hyperparameters({"encoding": encoding.state_dict()}, logger=False)

    @property
    def numbers(self) -> int:
        """How many features are numbers; ``${from_data:numbers}`` passes it to the network, like the next two."""
        return self.encoding.number_count

    @property
    def categories(self) -> list[int]:
        """How many categories each other feature has, the unknown one included."""
        return [1 + len(texts) for texts in self.encoding.categories.values()]

    @property
    def outputs(self) -> int:
        """The number of classes, or 1 where the target is a number."""
        return len(self.encoding.classes) or 1

    @override
    def setup(self, stage: str) -> None:
        """Read the table, so that what is wrong in it is told before a run begins."""
        if stage == "fit":
            _ = self._rows("train"), self._rows("val")

    @override
    def train_dataloader(self) -> EpochLoader:
        return self.train_loader(self._rows("train"), collate_fn=as_batch)

    @override
    def val_dataloader(self) -> EpochLoader:
        return self.eval_loader(self._rows("val"), collate_fn=as_batch)

    @override
    def test_dataloader(self) -> EpochLoader:
        return self.eval_loader(self._rows("test"), collate_fn=as_batch)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        if self.predict_file is None:
            return self.predict_loader(self._rows("test"), collate_fn=as_batch)
        table = read_table(matching_files(self.predict_file, "predict"))
        return self.predict_loader(self.encoding.encode(table, with_target=False), collate_fn=as_batch)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "encoding": self.encoding.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self._take(TableEncoding.from_state_dict(state.pop("encoding")))
        super().load_state_dict(state)

    def _rows(self, split: str) -> EncodedTable:
        if split not in self._encoded:
            self._encoded[split] = self.encoding.encode(self._split(split))
        return self._encoded[split]

    def _split(self, split: str) -> Table:
        if isinstance(self.files, Mapping):
            if split not in self.files:
                raise ValueError(f"--data.files: there are files of {', '.join(self.files)}, but none of {split}")
            return self._files_of(split)
        return self._whole.take(self._parts[split])

    def _files_of(self, split: str) -> Table:
        if split not in self._tables:
            self._tables[split] = read_table(matching_files(self.files[split]))  # type: ignore[index, call-overload]
        return self._tables[split]

    @cached_property
    def _tables(self) -> dict[str, Table]:
        return {}

    @cached_property
    def _whole(self) -> Table:
        if self.files is None:
            columns, name, _ = self.default_table()
            return table_of(columns, name)
        return read_table(matching_files(self.files))  # type: ignore[arg-type]

    @cached_property
    def _parts(self) -> Mapping[str, Any]:
        kind = self.kind or target_kind(self._whole, self._target)
        parts = split_rows(self._whole, self._target, kind, SHARES)
        if empty := [split for split, rows in parts.items() if len(rows) == 0]:
            raise ValueError(f"{self._whole.name}: {len(self._whole)} rows are too few: none is left for {empty[0]}")
        return parts

    @property
    def _target(self) -> str:
        if self.target is not None:
            return self.target
        if self._encoding is not None:
            return self._encoding.target
        if self.files is not None:
            raise ValueError("--data.target: say which column is to be predicted")
        return self.default_table()[2]
