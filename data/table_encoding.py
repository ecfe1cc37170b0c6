"""How a table becomes tensors: what the training part says about its columns, and the columns as numbers."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_muon.data.table_files import Table

TargetKind = Literal["regression", "classification"]

# A text that occurs less often says nothing of its own: it is encoded as unknown, which so is trained as well.
_LEAST_OCCURRENCES = 2
# Whole numbers of at most so many values are classes, as a target.
_MOST_CLASSES_OF_NUMBERS = 10


class TableBatch(NamedTuple):
    """Rows of a table.

    Args:
        numbers: Standardized, shape (rows, numbers), float32.
        categories: The index of each category, 0 for an unknown one, shape (rows, columns), int64.
        target: Classes, shape (rows,), int64, or standardized numbers, float32; -1 and NaN where they are not known.
        row: The row in the file, from 1, shape (rows,), int64.
    """

    numbers: Tensor
    categories: Tensor
    target: Tensor
    row: Tensor


class EncodedTable(Dataset[TableBatch]):
    """A table as tensors; a batch is one look-up. Its loader needs ``collate_fn=as_batch``.

    Args:
        rows: All rows.
    """

    def __init__(self, rows: TableBatch) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows.row)

    def __getitem__(self, index: int) -> TableBatch:
        """Return one row."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> TableBatch:
        """Return several rows at once, as torch's loaders ask for them."""
        rows = torch.tensor(indices)
        return TableBatch(*(values[rows] for values in self.rows))


def as_batch(batch: TableBatch) -> TableBatch:
    """Return the rows that :class:`EncodedTable` has put together already."""
    return batch


@dataclass(frozen=True)
class TableEncoding:
    """What the training part of a table says about its columns; by it all tables of a run become tensors.

    Args:
        target: The column to predict.
        kind: ``regression`` or ``classification``.
        numbers: Mean and standard deviation of the columns of numbers and dates.
        with_missing: The columns of numbers with missing values: for each there is a second one, which is 1 where the
            value is missing, standardized too. The missing value itself is the mean.
        categories: The texts of each column of categories, in the order of their indices from 1.
        classes: The classes in the order of the outputs; empty for regression.
        target_mean: Mean of the target; 0 for classification.
        target_std: Standard deviation of the target; 1 for classification.
    """

    target: str
    kind: TargetKind
    numbers: dict[str, tuple[float, float]]
    with_missing: dict[str, tuple[float, float]]
    categories: dict[str, list[str]]
    classes: list[str]
    target_mean: float = 0.0
    target_std: float = 1.0

    @classmethod
    def of(
        cls, table: Table, target: str, kind: TargetKind, categorical: Collection[str], ignore: Collection[str]
    ) -> "TableEncoding":
        """Take the encoding from the training part of a table.

        Args:
            table: The training part.
            target: The column to predict.
            kind: What the target is.
            categorical: Columns of categories, whatever their values look like. Beside them, columns of texts are.
            ignore: Columns to leave out.

        Raises:
            ValueError: If a column is not there, has no value or cannot be encoded; if the target has one value only,
                or none in some row; or if there is no column but the target.
        """
        for name in (target, *categorical, *ignore):
            table.column(name)
        if both := {target} & {*categorical, *ignore}:
            raise ValueError(
                f"{table.name}: the column {both.pop()!r} is the target: it cannot be a feature or ignored"
            )
        numbers, with_missing, categories = {}, {}, {}
        for name in table.columns:
            if name == target or name in ignore:
                continue
            if name in categorical or (found := table.kind(name)) == "text":
                categories[name] = _vocabulary(table, name)
            elif found == "empty":
                raise ValueError(f"{table.name}: the column {name!r} has no value; leave it out: --data.ignore+={name}")
            else:
                values = table.numbers(name)
                numbers[name] = _mean_and_std(values)
                if np.isnan(values).any():
                    with_missing[name] = _mean_and_std(np.isnan(values).astype(np.float64))
        if not numbers and not categories:
            raise ValueError(f"{table.name}: there is no column beside the target {target!r}")
        _warn_of_rare_texts(table, categories)
        table.check_complete(target)
        if kind == "regression":
            mean, std = _mean_and_std(values := table.numbers(target))
            if values.min() == values.max():
                raise ValueError(f"{table.name}: the target {target!r} is always {values[0]:g}: nothing to learn")
            return cls(target, kind, numbers, with_missing, categories, [], mean, std)
        classes = sorted(table.texts(target).unique().to_pylist(), key=_in_order)
        if len(classes) == 1:
            raise ValueError(f"{table.name}: the target {target!r} is always {classes[0]!r}: nothing to learn")
        return cls(target, kind, numbers, with_missing, categories, classes)

    @property
    def number_count(self) -> int:
        """How many numbers a row has, the marks of missing ones included."""
        return len(self.numbers) + len(self.with_missing)

    def encode(self, table: Table, *, with_target: bool = True) -> EncodedTable:
        """Return a table as tensors.

        Args:
            table: It has the columns of the training part, in any order; others are not used.
            with_target: Whether it has the target.

        Raises:
            ValueError: If a column is not there, a text is in a column of numbers, or the target is missing in some
                row or is a class that the training part has not.
        """
        numbers = np.zeros((len(table), self.number_count), np.float32)
        for column, (name, (mean, std)) in enumerate(self.numbers.items()):
            numbers[:, column] = np.nan_to_num((table.numbers(name) - mean) / std)
        for column, (name, (mean, std)) in enumerate(self.with_missing.items(), start=len(self.numbers)):
            numbers[:, column] = (np.isnan(table.numbers(name)) - mean) / std
        categories = np.zeros((len(table), len(self.categories)), np.int64)
        for column, (name, texts) in enumerate(self.categories.items()):
            categories[:, column] = _indices(table, name, texts) + 1
        unknown = torch.full((len(table),), -1 if self.classes else torch.nan)
        target = self._encode_target(table) if with_target else unknown
        rows = torch.from_numpy(table.row_numbers())
        return EncodedTable(TableBatch(torch.from_numpy(numbers), torch.from_numpy(categories), target, rows))

    def _encode_target(self, table: Table) -> Tensor:
        table.check_complete(self.target)
        if self.kind == "regression":
            standardized = (table.numbers(self.target) - self.target_mean) / self.target_std
            return torch.from_numpy(standardized.astype(np.float32))
        indices = _indices(table, self.target, self.classes)
        if (indices < 0).any():
            at = int((indices < 0).argmax())
            value = table.texts(self.target)[at].as_py()
            raise ValueError(f"{table.place(self.target, at)}: the class {value!r} is not in the training part")
        return torch.from_numpy(indices)

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "TableEncoding":
        """Return what :meth:`state_dict` described."""
        return cls(**state)


def target_kind(table: Table, target: str) -> TargetKind:
    """Return what a target is: classes, if it has texts or at most ten different whole numbers.

    Raises:
        ValueError: If it has no value.
    """
    kind = table.kind(target)
    if kind == "empty":
        raise ValueError(f"{table.name}: the target {target!r} has no value")
    if kind == "text":
        return "classification"
    values = np.unique(table.numbers(target))
    values = values[~np.isnan(values)]
    are_classes = len(values) <= _MOST_CLASSES_OF_NUMBERS and not (values % 1).any()
    return "classification" if are_classes and kind == "number" else "regression"


def split_rows(
    table: Table, target: str, kind: TargetKind, shares: Mapping[str, float]
) -> dict[str, NDArray[np.int64]]:
    """Share out the rows of a table at random, always in the same way, with the target alike in all parts.

    Args:
        table: The table.
        target: The column that is to be alike: each part has its share of each class, or of large and small values.
        kind: What the target is.
        shares: The share of each part by its name. The first gets at least one row of each class.
    """
    if kind == "regression":
        codes = table.numbers(target)
    else:
        codes = table.texts(target).combine_chunks().dictionary_encode().indices.to_numpy()
    draw = np.random.default_rng(0)
    order = draw.permutation(len(table))
    order = order[np.argsort(codes[order], kind="stable")]
    # Multiples of the golden ratio are spread evenly: so is each part, among the rows that are in order of the target.
    place = (draw.random() + np.arange(len(order)) * (5**0.5 - 1) / 2) % 1
    part = np.searchsorted(np.cumsum(list(shares.values()))[:-1], place, side="right")
    if kind == "classification":
        part[np.unique(codes[order], return_index=True)[1]] = 0
    return {name: np.sort(order[part == index]) for index, name in enumerate(shares)}


def _vocabulary(table: Table, name: str) -> list[str]:
    counts = table.texts(name).value_counts().to_pylist()
    return sorted(entry["values"] for entry in counts if entry["counts"] >= _LEAST_OCCURRENCES)


def _indices(table: Table, name: str, texts: list[str]) -> NDArray[np.int64]:
    """Return the index of each entry in a list of texts, -1 where it is not there; shape (rows,)."""
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.compute as pc  # noqa: PLC0415

    found = pc.index_in(table.texts(name), pa.array(texts, pa.string()))
    indices: NDArray[np.int64] = pc.fill_null(pc.cast(found, pa.int64()), -1).to_numpy().copy()  # torch may write to it
    return indices


def _mean_and_std(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return both of what is not missing; 1 as the deviation of what is constant but for rounding."""
    mean, std = float(np.nanmean(values)), float(np.nanstd(values))
    return mean, std if std > 1e-9 * abs(mean) and std > 0 else 1.0


def _in_order(text: str) -> tuple[float, str]:
    """Sort numbers by their value, before texts."""
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def _warn_of_rare_texts(table: Table, categories: Mapping[str, list[str]]) -> None:
    if useless := [name for name, texts in categories.items() if not texts]:
        warnings.warn(
            f"{table.name}: each text occurs once in {', '.join(map(repr, useless))}: nothing can be learned from it; "
            f"leave it out: --data.ignore+={useless[0]}",
            stacklevel=2,
        )
