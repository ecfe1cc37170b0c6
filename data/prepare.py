"""Turn text into files of tokens: on all cores, and restartable."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

from lightning_muon.data.documents import Document, Piece, all_files, cut_into_pieces, documents
from lightning_muon.data.tokenizers import Tokenizer, load_tokenizer
from lightning_muon.data.tokens import TokenShards

_FACTS = "tokens.json"
_SUFFIX = ".unfinished"
# A worker process takes a second or two to start.
_LEAST_BYTES_FOR_WORKERS = 1 << 25
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class PreparedTokens:
    """A folder of tokens, as :func:`prepare_tokens` writes it.

    Args:
        folder: The folder.
        dtype: The dtype of its files.
        vocabulary: The number of tokens that the tokenizer has.
        counts: The number of tokens of each split.
    """

    folder: Path
    dtype: str
    vocabulary: int
    counts: Mapping[str, int]

    def split(self, name: str) -> TokenShards:
        """Return the tokens of a split.

        Raises:
            ValueError: If the split is empty.
        """
        if not self.counts.get(name):
            raise ValueError(f"{self.folder} has no tokens of the split {name!r}: add text")
        return TokenShards(sorted(self.folder.glob(f"*/{name}.bin")), self.dtype)


def prepare_tokens(
    files: Sequence[Path] | Mapping[str, Sequence[Path]],
    folder: str | Path,
    tokenizer: str | Path = "bytes",
    *,
    end: str | None = None,
    field: str = "text",
    workers: int | None = None,
) -> PreparedTokens:
    """Write the tokens of files to a folder below ``folder``, unless an earlier call has done so.

    The folder is named after the files, their sizes and times of change, and the tokenizer. Each worker writes a piece
    of about 64 MiB at a time, under its final name only when it is complete; a call after a kill goes on with the
    pieces that are missing, and the whole gets its name at the end.

    Args:
        files: Text files in any encoding; JSON lines (``.jsonl``, ``.ndjson``) or Parquet, a document in each line or
            row. All of them, to be split by :func:`~lightning_muon.data.documents.cut_into_pieces`, or those of each
            split ``"train"``, ``"val"`` and ``"test"``.
        folder: The folder of prepared data.
        tokenizer: See :func:`~lightning_muon.data.tokenizers.load_tokenizer`.
        end: The token between documents, by its text; default: the usual one.
        field: The key of the text in JSON lines, or its column in Parquet.
        workers: Number of processes; default: one for each core, and none for less than 32 MiB.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If a file is not as its name says, with its place.
    """
    paths = all_files(files)
    if not paths:
        raise FileNotFoundError("there is no file to make tokens of")
    loaded = load_tokenizer(tokenizer, end)
    target = Path(folder) / _name(files, loaded, field)
    if not (target / _FACTS).is_file():
        unfinished = target.with_name(target.name + _SUFFIX)
        unfinished.mkdir(parents=True, exist_ok=True)
        with _alone_in(unfinished):
            if (target / _FACTS).is_file():  # another process has done it meanwhile
                with contextlib.suppress(OSError):
                    unfinished.rmdir()
            else:
                _write(files, paths, unfinished, target, _Job(unfinished, tokenizer, end, field), workers)
                _finish(unfinished, target, loaded)
    facts = json.loads((target / _FACTS).read_text())
    return PreparedTokens(target, facts["dtype"], facts["vocabulary"], facts["counts"])


def _write(
    files: Sequence[Path] | Mapping[str, Sequence[Path]],
    paths: Sequence[Path],
    unfinished: Path,
    target: Path,
    job: "_Job",
    workers: int | None,
) -> None:
    """Write the pieces that are missing."""
    pieces = dict(enumerate(cut_into_pieces(files)))
    missing = {number: piece for number, piece in pieces.items() if not (unfinished / f"{number:06d}").is_dir()}
    size = sum(path.stat().st_size for path in paths)
    if workers is None:
        workers = min(os.cpu_count() or 1, len(missing)) if size >= _LEAST_BYTES_FOR_WORKERS else 0
    for done in _run(job, missing, workers):
        _show(len(pieces) - len(missing) + done, len(pieces), target)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep out other processes, such as runs of one sweep that begin together: they wait, and find it done.

    The kernel releases the lock of a killed process. Without locks, as on Windows and some network file systems,
    processes write the same files, and the first one's count.
    """
    descriptor = None
    try:
        with contextlib.suppress(OSError, ModuleNotFoundError):
            import fcntl  # noqa: PLC0415 - not on Windows

            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know beside its piece."""

    folder: Path
    tokenizer: str | Path
    end: str | None
    field: str

    def write(self, number: int, piece: Piece) -> None:
        """Write the tokens of a piece, a file for each split, into a folder with the number of the piece."""
        tokenizer = load_tokenizer(self.tokenizer, self.end)
        unfinished = self.folder / f"{number:06d}.{os.getpid()}{_SUFFIX}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        with ExitStack() as stack:
            writers: dict[str, BinaryIO] = {}
            for batch in _batches(documents(piece, self.field)):
                texts = [one.content if isinstance(one.content, str) else tokenizer.text(one.content) for one in batch]
                for document, tokens in zip(batch, tokenizer.encode(texts), strict=True):
                    if document.split not in writers:
                        path = unfinished / f"{document.split}.bin"
                        writers[document.split] = stack.enter_context(path.open("wb"))
                    writer = writers[document.split]
                    writer.write(tokens.astype(f"<{tokens.dtype.str[1:]}", copy=False).tobytes())
                    if document.is_end and tokenizer.end is not None:
                        writer.write(tokenizer.end.to_bytes(tokens.dtype.itemsize, "little"))
        with contextlib.suppress(OSError):  # another run has written the same piece meanwhile
            unfinished.rename(self.folder / f"{number:06d}")
        shutil.rmtree(unfinished, ignore_errors=True)


def _run(job: _Job, pieces: Mapping[int, Piece], workers: int) -> Iterator[int]:
    """Write pieces, and yield how many are done, after each."""
    if workers <= 1:
        for done, (number, piece) in enumerate(pieces.items(), start=1):
            job.write(number, piece)
            yield done
        return
    # Not forks: this process may have threads, of torch and of tokenizers.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(job.write, number, piece) for number, piece in pieces.items()]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                yield done
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _batches(parts: Iterable[Document]) -> Iterator[list[Document]]:
    """Gather documents into batches of about 1 MiB, which tokenizers of Rust encode in parallel."""
    batch: list[Document] = []
    size = 0
    for document in parts:
        batch.append(document)
        size += len(document.content)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _name(files: Sequence[Path] | Mapping[str, Sequence[Path]], tokenizer: Tokenizer, field: str) -> str:
    of_splits = files if isinstance(files, Mapping) else {"": files}
    facts = [
        (split, str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns)
        for split, paths in of_splits.items()
        for path in paths
    ]
    return hashlib.sha256(repr((facts, tokenizer.identity, field)).encode()).hexdigest()[:16]


def _finish(unfinished: Path, target: Path, tokenizer: Tokenizer) -> None:
    """Write the facts, and give the folder its name."""
    for leftover in unfinished.glob(f"*{_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)
    counts: dict[str, int] = {}
    itemsize = int(tokenizer.dtype.removeprefix("uint")) // 8
    for file in unfinished.glob("*/*.bin"):
        counts[file.stem] = counts.get(file.stem, 0) + file.stat().st_size // itemsize
    facts = {"dtype": tokenizer.dtype, "vocabulary": tokenizer.vocabulary, "end": tokenizer.end, "counts": counts}
    (unfinished / _FACTS).write_text(json.dumps(facts, indent=1))
    with contextlib.suppress(OSError):  # another run has done it meanwhile
        unfinished.rename(target)


def _show(done: int, total: int, target: Path) -> None:
    """Show the progress of several pieces: on a terminal in one line, elsewhere in one line each tenth."""
    if total < 2:
        return
    terminal = sys.stderr.isatty()
    if terminal or done == total or done * 10 // total > (done - 1) * 10 // total:
        print(
            f"{target}: {done} of {total} pieces", file=sys.stderr, end="\n" if not terminal or done == total else "\r"
        )
