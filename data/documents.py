"""The documents in text, JSON lines and Parquet files, cut into pieces of work."""

import glob
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_muon.data.extras import package

SPLITS = {"train": 0.9, "val": 0.05, "test": 0.05}
"""The share of each split, where the user does not say."""

PIECE_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 20
_ROWS = 1024  # of a Parquet file, read at a time
_JSON_LINES = {".jsonl", ".ndjson"}
_PARQUET = ".parquet"


class Span(NamedTuple):
    """A part of a file: bytes of text or JSON lines, or row groups of a Parquet file.

    ``is_end`` is whether the file, or the part of it that belongs to the split, ends here.
    """

    path: Path
    start: int
    end: int
    is_end: bool = True


@dataclass(frozen=True)
class Piece:
    """Parts of files that one worker reads at a time.

    Args:
        spans: The parts.
        split: Their split; ``None`` if each document has its own.
    """

    spans: tuple[Span, ...]
    split: str | None


class Document(NamedTuple):
    """Bytes of a text file, or a text, whose document ends here or goes on."""

    split: str
    content: bytes | str
    is_end: bool


def all_files(files: Sequence[Path] | Mapping[str, Sequence[Path]]) -> list[Path]:
    """Return files, or those of all splits, as one list."""
    return [path for paths in files.values() for path in paths] if isinstance(files, Mapping) else list(files)


def matching_files(patterns: str | Sequence[str], option: str = "files") -> list[Path]:
    """Return the files that match patterns such as ``corpus/**/*.txt``, each once, by their names.

    Args:
        patterns: The patterns, relative or absolute.
        option: The option of the data module that has them, for the message.

    Raises:
        FileNotFoundError: If there are none.
        OSError: If one cannot be read.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (Path(match) for pattern in patterns for match in glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too
    paths = readable_files(found)
    if not paths:
        raise FileNotFoundError(f"--data.{option} {', '.join(patterns)}: no file matches in {Path.cwd()}")
    return paths


def readable_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among paths, each once, by their names.

    Raises:
        OSError: If one cannot be read: before anything is written.
    """
    files = sorted({path for path in paths if path.is_file()})
    for path in files:
        path.open("rb").close()
    return files


def cut_into_pieces(files: Sequence[Path] | Mapping[str, Sequence[Path]]) -> list[Piece]:
    """Plan how files are read; the plan depends on their names and contents only.

    Text files belong to a split each, by a hash of their names; if they are fewer than splits, their beginnings are for
    training and their ends for validation and test. A file of JSON lines or Parquet holds many documents: each belongs
    to a split by a hash of its text, so that copies of a document are in one.

    Args:
        files: The files; or those of each split.
    """
    if isinstance(files, Mapping):
        of_split = [
            (split, span) for split, paths in files.items() for path in paths for span in _spans(path, _size(path))
        ]
        return _gathered(of_split)
    several = [path for path in files if _holds_documents(path)]
    texts = [path for path in files if not _holds_documents(path)]
    assigned: list[tuple[str | None, Span]] = [(None, span) for path in several for span in _spans(path, _size(path))]
    if len(texts) < len(SPLITS):
        assigned += [part for path in texts for part in _by_position(path)]
    else:
        assigned += [(split, span) for path, split in _by_name(texts) for span in _spans(path, _size(path))]
    return _gathered(assigned)


def documents(piece: Piece, field: str) -> Iterator[Document]:
    """Yield the documents of a piece, text files in parts of about 1 MiB.

    Args:
        piece: The piece.
        field: The key of the text in JSON lines, or its column in Parquet.

    Raises:
        ModuleNotFoundError: If a file is Parquet, and pyarrow is not installed.
        ValueError: If a line is no JSON object, there is no such field, or it is no text.
    """
    for span in piece.spans:
        if not _holds_documents(span.path):
            for content, is_end in _parts(span):
                yield Document(piece.split or "train", content, is_end)
            continue
        read_texts = _parquet_texts if span.path.suffix == _PARQUET else _json_texts
        for text in read_texts(span, field):
            yield Document(piece.split or _split_of(text), text, is_end=True)


def _holds_documents(path: Path) -> bool:
    return path.suffix in _JSON_LINES or path.suffix == _PARQUET


def _size(path: Path) -> int:
    return len(_RowGroups(path)) if path.suffix == _PARQUET else path.stat().st_size


def _spans(path: Path, end: int, start: int = 0) -> Iterator[Span]:
    """Cut a part of a file into spans of at most about ``PIECE_BYTES``, at the ends of lines."""
    if path.suffix == _PARQUET:
        yield from (Span(path, group, group + 1) for group in range(start, end))
        return
    begin = start
    while begin < end:
        following = begin + PIECE_BYTES
        following = end if following >= end else min(end, _after_line(path, following))
        yield Span(path, begin, following, following == end)
        begin = following


def _after_line(path: Path, position: int) -> int:
    """Return where the line ends that a position is in; for a text, the position if there is no end within a chunk."""
    with path.open("rb") as file:
        file.seek(position)
        while chunk := file.read(_CHUNK_BYTES):
            if (at := chunk.find(b"\n")) >= 0:
                return position + at + 1
            if path.suffix not in _JSON_LINES:
                return position
            position += len(chunk)
    return position


def _by_name(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    root = os.path.commonpath(paths)
    by_hash = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path.relative_to(root))).digest())
    held_out = max(1, round(SPLITS["val"] * len(paths)))
    for rank, path in enumerate(by_hash):
        yield path, "test" if rank < held_out else "val" if rank < 2 * held_out else "train"


def _by_position(path: Path) -> Iterator[tuple[str, Span]]:
    size, start, share = path.stat().st_size, 0, 0.0
    for split, of_split in SPLITS.items():
        share += of_split
        end = round(share * size)
        yield from ((split, span) for span in _spans(path, end, start))
        start = end


def _split_of(text: str) -> str:
    place = zlib.crc32(text.encode(errors="replace")) / 2**32
    return "train" if place < SPLITS["train"] else "val" if place < SPLITS["train"] + SPLITS["val"] else "test"


def _gathered(spans: Iterable[tuple[str | None, Span]]) -> list[Piece]:
    """Put small spans of one split together."""
    pieces: list[Piece] = []
    gathered: dict[str | None, tuple[list[Span], int]] = {}
    for split, span in spans:
        own, size = gathered.pop(split, ([], 0))
        own.append(span)
        size += PIECE_BYTES // 4 if span.path.suffix == _PARQUET else span.end - span.start
        if size < PIECE_BYTES:
            gathered[split] = own, size
        else:
            pieces.append(Piece(tuple(own), split))
    return pieces + [Piece(tuple(own), split) for split, (own, _) in gathered.items()]


def _parts(span: Span) -> Iterator[tuple[bytes, bool]]:
    """Yield a span of a text file in parts that end with lines, if lines are shorter than the parts."""
    with span.path.open("rb") as file:
        file.seek(span.start)
        rest, left = b"", span.end - span.start
        while left > 0:
            chunk = file.read(min(_CHUNK_BYTES, left))
            if not chunk:
                raise ValueError(f"{span.path} has become shorter while it was read")
            left -= len(chunk)
            content = rest + chunk
            cut = content.rfind(b"\n") + 1 if left else len(content)
            cut = cut or len(content)
            rest = content[cut:]
            yield content[:cut], span.is_end and left == 0


def _json_texts(span: Span, field: str) -> Iterator[str]:
    with span.path.open("rb") as file:
        file.seek(span.start)
        while file.tell() < span.end:
            place = f"{span.path}, byte {file.tell()}"
            line = file.readline()
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: the line is no JSON: {error}") from None
            if not isinstance(entry, dict):
                raise ValueError(f"{place}: the line is no JSON object")
            if field not in entry:
                raise ValueError(f"{place}: there is no key {field!r}, but {', '.join(map(repr, entry)) or 'none'}")
            if not isinstance(entry[field], str):
                raise ValueError(f"{place}: {field!r} is no text")
            yield entry[field]


def _parquet_texts(span: Span, field: str) -> Iterator[str]:
    return _RowGroups(span.path).texts(span.start, span.end, field)


class _RowGroups:
    """The row groups of a Parquet file."""

    def __init__(self, path: Path) -> None:
        with package("pyarrow", path):
            import pyarrow.parquet  # noqa: PLC0415
        self.path = path
        self._file = pyarrow.parquet.ParquetFile(path)

    def __len__(self) -> int:
        return int(self._file.num_row_groups)

    def texts(self, start: int, end: int, field: str) -> Iterator[str]:
        columns = self._file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{self.path}: there is no column {field!r}, but {', '.join(map(repr, columns))}")
        for batch in self._file.iter_batches(_ROWS, row_groups=list(range(start, end)), columns=[field]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise ValueError(f"{self.path}: an entry of the column {field!r} is no text")
                yield text
