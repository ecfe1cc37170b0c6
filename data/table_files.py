"""Tables in CSV and Parquet files: columns as numbers or as texts, and where a wrong value is."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_muon.data.extras import package

ColumnKind = Literal["number", "date", "text", "empty"]

# How CSV files spell a missing value; as pandas has it, and "?", as the UCI repository does.
_MISSING = ["", "?", "#N/A", "-nan", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
_DELIMITERS = ",;\t|"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Table:
    """Columns of equal length, from one or several files.

    Args:
        columns: The columns by name, each a ``ChunkedArray`` of pyarrow; of CSV files, as texts.
        sources: The files with their numbers of rows, in the order of the rows.
        rows: Which rows of the files these are, shape (rows,); default: all.
        kinds: The kinds of columns that are known already.
    """

    columns: Mapping[str, Any]
    sources: Sequence[tuple[str, int]]
    rows: NDArray[np.int64] | None = None
    kinds: dict[str, ColumnKind] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(count for _, count in self.sources) if self.rows is None else len(self.rows)

    @property
    def name(self) -> str:
        """The name of the file, or of the first with the number of the others."""
        first, others = self.sources[0][0], len(self.sources) - 1
        return f"{first} and {others} more" if others else first

    def take(self, rows: NDArray[np.int64]) -> "Table":
        """Return some of the rows of a whole table."""
        columns = {name: column.take(rows) for name, column in self.columns.items()}
        return replace(self, columns=columns, rows=rows, kinds={})

    def row_numbers(self) -> NDArray[np.int64]:
        """Return the row of each entry in its file, shape (rows,); the first below the header is row 1."""
        numbers = np.concatenate([np.arange(1, count + 1) for _, count in self.sources])
        return numbers if self.rows is None else numbers[self.rows]

    def place(self, name: str, index: int) -> str:
        """Return where an entry is, such as ``a.csv, column 'age', row 17``."""
        at = index if self.rows is None else int(self.rows[index])
        for source, count in self.sources:
            if at < count:
                return f"{source}, column {name!r}, row {at + 1}"
            at -= count
        raise IndexError(index)

    def column(self, name: str) -> Any:
        """Return a column.

        Raises:
            ValueError: If there is none of this name.
        """
        if name not in self.columns:
            raise ValueError(f"{self.name}: there is no column {name!r}, but {_listed(self.columns)}")
        return self.columns[name]

    def kind(self, name: str) -> ColumnKind:
        """Return whether a column has numbers, dates or texts, which boolean values are too, or nothing.

        Raises:
            ValueError: If a few texts are among numbers, or its type is another.
        """
        if name not in self.kinds:
            self.kinds[name] = self._kind(name)
        return self.kinds[name]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return a column as numbers, shape (rows,), NaN where a value is missing; dates as days since 1970.

        Raises:
            ValueError: If a value is no number, or is infinite.
        """
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.compute as pc  # noqa: PLC0415

        column, kind = self.column(name), self.kind(name)
        if kind == "date":
            seconds = pc.cast(pc.cast(column, pa.timestamp("s"), safe=False), pa.int64())
            column = pc.divide(pc.cast(seconds, pa.float64()), _SECONDS_A_DAY)
        elif kind == "text":
            at = self._first(name, pc.invert(_are_numbers(column)))
            raise ValueError(f"{self.place(name, at)}: {str(column[at].as_py())!r} is no number")
        values: NDArray[np.float64] = pc.cast(column, pa.float64()).to_numpy()
        if np.isinf(values).any():
            raise ValueError(f"{self.place(name, int(np.isinf(values).argmax()))}: the value is infinite")
        return values

    def texts(self, name: str) -> Any:
        """Return a column as texts, a ``ChunkedArray`` of pyarrow; a missing value is the empty text."""
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.compute as pc  # noqa: PLC0415

        column = self.column(name)
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        return pc.fill_null(pc.cast(column, pa.string()), "")

    def check_complete(self, name: str) -> None:
        """Raise a ``ValueError`` if a value of the column is missing."""
        import pyarrow.compute as pc  # noqa: PLC0415

        missing = pc.is_null(self.column(name), nan_is_null=True)
        if count := pc.sum(missing).as_py():
            others = f", and in {count - 1} more rows" if count > 1 else ""
            raise ValueError(f"{self.place(name, self._first(name, missing))}: the target has no value{others}")

    def _kind(self, name: str) -> ColumnKind:
        import pyarrow as pa  # noqa: PLC0415 - an extra

        column = self.column(name)
        kinds, of = pa.types, column.type
        if column.null_count == len(column):
            return "empty"
        if kinds.is_dictionary(of) or kinds.is_boolean(of):
            return "text"
        if kinds.is_integer(of) or kinds.is_floating(of) or kinds.is_decimal(of):
            return "number"
        if kinds.is_timestamp(of) or kinds.is_date(of):
            return "date"
        if not (kinds.is_string(of) or kinds.is_large_string(of)):
            raise ValueError(
                f"{self.name}: the column {name!r} has the type {of}: neither number, date nor text; "
                f"leave it out: --data.ignore+={name}"
            )
        return self._kind_of_texts(name)

    def _kind_of_texts(self, name: str) -> ColumnKind:
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.compute as pc  # noqa: PLC0415

        column = self.columns[name]
        are_numbers = _are_numbers(column)
        share = pc.mean(are_numbers).as_py()
        if share == 1:
            return "number"
        if share > 0.5:
            at = self._first(name, pc.invert(are_numbers))
            raise ValueError(
                f"{self.place(name, at)}: {column[at].as_py()!r} is no number, but most values are; "
                f"correct it, or say what the column is: --data.categorical+={name} or --data.ignore+={name}"
            )
        try:
            pc.cast(column, pa.timestamp("s"))
        except pa.ArrowInvalid:
            return "text"
        return "date"

    def _first(self, name: str, mask: Any) -> int:
        return int(np.flatnonzero(mask.to_numpy(zero_copy_only=False) == True)[0])  # noqa: E712 - None is neither


def read_table(paths: Sequence[Path]) -> Table:
    """Read CSV files, with any usual delimiter and a header, or Parquet files; several are laid one below the other.

    Raises:
        ModuleNotFoundError: If pyarrow is not installed.
        ValueError: If a file has no rows or cannot be read, or if the files do not fit to one another.
    """
    with package("pyarrow", paths[0]):
        import pyarrow as pa  # noqa: PLC0415

    tables = [_read_file(path) for path in paths]
    names = tables[0].column_names
    for path, table in zip(paths, tables, strict=True):
        if missing := set(names) - set(table.column_names):
            raise ValueError(f"{path}: there is no column {min(missing)!r}, which {paths[0]} has")
    try:
        whole = pa.concat_tables([table.select(names) for table in tables], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{paths[0]} and {len(paths) - 1} more: {_line(error)}") from None
    sources = [(str(path), table.num_rows) for path, table in zip(paths, tables, strict=True)]
    return Table(dict(zip(names, whole.columns, strict=True)), sources)


def table_of(columns: Mapping[str, Sequence[Any]], name: str) -> Table:
    """Return a table of columns in memory, such as lists and arrays, under the name that errors give it."""
    with package("pyarrow", "a table"):
        import pyarrow as pa  # noqa: PLC0415

    arrays = {key: pa.chunked_array([pa.array(values)]) for key, values in columns.items()}
    return Table(arrays, [(name, len(next(iter(arrays.values()))))])


def _read_file(path: Path) -> Any:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        table = pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {_line(error)}") from None
    if table.num_rows == 0:
        raise ValueError(f"{path} has no rows")
    if twice := [name for name in table.column_names if table.column_names.count(name) > 1]:
        raise ValueError(f"{path}: there are two columns {twice[0]!r}")
    return table


def _read_csv(path: Path) -> Any:
    """Read a CSV file as texts without spaces around them, null where a value is missing."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute as pc  # noqa: PLC0415
    import pyarrow.csv  # noqa: PLC0415

    with pa.input_stream(str(path), compression="detect") as stream:
        head = stream.read(1 << 16).decode("utf-8-sig", errors="replace").splitlines()
    delimiter = max(_DELIMITERS, key=head[0].count) if head else ","
    names = next(csv.reader(head, delimiter=delimiter), [])
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), null_values=_MISSING, strings_can_be_null=True
    )
    try:
        table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid:  # once more, because only one thread counts the rows for the message
        table = pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(use_threads=False), parse, convert)
    stripped = [pc.utf8_trim_whitespace(column) for column in table.columns]
    columns = [pc.if_else(pc.is_in(column, pa.array(_MISSING)), None, column) for column in stripped]
    return pa.table(columns, names=[name.strip() for name in table.column_names])


def _are_numbers(column: Any) -> Any:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute as pc  # noqa: PLC0415

    if pa.types.is_dictionary(column.type) or pa.types.is_boolean(column.type):
        return pc.and_(pc.is_null(column), pc.is_valid(column))  # none is
    return pc.match_substring_regex(column, _NUMBER)


def _listed(names: Iterable[str], most: int = 20) -> str:
    def shown() -> Iterator[str]:
        for count, name in enumerate(names):
            if count == most:
                yield "…"
                return
            yield repr(name)

    return ", ".join(shown())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
