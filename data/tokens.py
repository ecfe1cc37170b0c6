"""Tokens in memory-mapped files, and the samples that are cut from them."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# The header of a shard of llm.c and of the NanoGPT speedrun: 256 int32, of which the first three are a magic number, a
# version, and the number of tokens. https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py
_HEADER_BYTES = 1024
_DTYPE_OF_MAGIC = {20240520: np.uint16, 20240801: np.uint32}
# Mapped pages count as memory of the process until they are dropped. A read maps their neighbours too, if they are
# cached: 16 pages of 4 KiB on Linux, and more where the cache has large pages.
_BYTES_TO_DROP = 1 << 24
_BYTES_AROUND = 1 << 16
DTYPES = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32}


class TokenShards:
    """Files of tokens, read as one sequence. They are memory-mapped, so they may be larger than memory.

    A file holds unsigned integers, little-endian, one after the other; or a shard of llm.c with its header, which says
    its dtype.

    Args:
        paths: The files, in their order.
        dtype: ``"uint8"``, ``"uint16"`` or ``"uint32"``, for files without a header.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If the size of a file is no whole number of tokens, or not what its header says.
    """

    def __init__(self, paths: Sequence[str | Path], dtype: str = "uint16") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if not paths:
            raise ValueError("there is no file of tokens")
        self.paths = [Path(path) for path in paths]
        self._shards = [_Shard(path, dtype) for path in self.paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self._mapped = 0  # bytes, at most, since pages were dropped

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ``count`` tokens from ``start`` on, dtype int64, over the ends of files.

        Raises:
            IndexError: If there are not so many.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        tokens = np.empty(count, dtype=np.int64)
        done = 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while done < count:
            first = start + done - (int(self._ends[number - 1]) if number else 0)
            piece = self._shards[number].read(first, count - done)
            tokens[done : done + len(piece)] = piece
            done += len(piece)
            number += 1
            self._mapped += piece.nbytes + _BYTES_AROUND
        if self._mapped > _BYTES_TO_DROP:
            for shard in self._shards:
                shard.drop()
            self._mapped = 0
        return tokens


class PackedTokens:
    """Samples of a sequence of tokens, packed without gaps: sample i begins at token i × ``context``.

    A dataset for torch's ``DataLoader``. The last token of a sample, a target only, is the first of the next, so that
    each token is predicted once. What is left at the end, shorter than a sample, is not used.

    Args:
        tokens: The tokens.
        context: Input tokens per sample.

    Raises:
        ValueError: If there are too few tokens for one sample.
    """

    def __init__(self, tokens: TokenShards, context: int) -> None:
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if len(tokens) <= context:
            raise ValueError(
                f"{tokens.paths[0].parent} has {len(tokens)} tokens, and a sample needs {context + 1}: add text, or"
                " reduce the context"
            )
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        """Return the number of samples."""
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a sample, shape (context + 1,), dtype int64; torch's ``DataLoader`` makes tensors of them."""
        return self.tokens.read(index * self.context, self.context + 1)


class _Shard:
    """A file of tokens; each process maps it when it reads first."""

    def __init__(self, path: Path, dtype: str) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(_HEADER_BYTES), dtype="<i4") if size >= _HEADER_BYTES else np.zeros(3)
        of_header = _DTYPE_OF_MAGIC.get(int(header[0]))
        self.path = path
        self.dtype = np.dtype(of_header or DTYPES[dtype]).newbyteorder("<")
        self.offset = _HEADER_BYTES if of_header else 0
        if (size - self.offset) % self.dtype.itemsize:
            raise ValueError(f"{path}: {size} bytes are no whole number of {self.dtype.name} tokens")
        self.count = (size - self.offset) // self.dtype.itemsize
        if of_header and self.count != header[2]:
            raise ValueError(f"{path}: its header says {header[2]} tokens, and it has {self.count}")
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_map": None}

    def read(self, start: int, count: int) -> np.ndarray:
        """Return a copy of at most ``count`` tokens, fewer at the end of the file."""
        count = min(count, self.count - start)
        if count <= 0:
            return np.empty(0, dtype=self.dtype)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = self.offset + start * self.dtype.itemsize
        return np.frombuffer(self._map, self.dtype, count, begin).copy()

    def drop(self) -> None:
        """Take the pages that were read out of the memory of this process; the system may keep them in its cache."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
