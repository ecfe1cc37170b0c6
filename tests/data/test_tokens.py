"""Files of tokens are one sequence, and samples are cut from it without gaps."""

import mmap
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lightning_muon.data import PackedTokens, TokenShards

LLM_C = {"uint16": 20240520, "uint32": 20240801}


def write(path: Path, tokens: np.ndarray, dtype: str, header: bool = False) -> Path:
    head = np.zeros(256, dtype="<i4")
    head[:3] = LLM_C.get(dtype, 0), 1, len(tokens)
    path.write_bytes((head.tobytes() if header else b"") + tokens.astype(dtype).tobytes())
    return path


@pytest.mark.parametrize(
    ("dtype", "header"), [("uint8", 0), ("uint16", 0), ("uint32", 0), ("uint16", 1), ("uint32", 1)]
)
def test_several_files_are_one_sequence(dtype: str, header: bool, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 3000)
    cuts = [0, 700, 700, 701, 3000]  # one is empty
    paths = [
        write(tmp_path / f"{number}.bin", tokens[start:end], dtype, header)
        for number, (start, end) in enumerate(pairwise(cuts))
    ]
    # The header tells the dtype, whatever is asked for.
    shards = TokenShards(paths, "uint8" if header else dtype)
    assert len(shards) == 3000
    for start, count in ((0, 3000), (699, 3), (650, 100), (2999, 1), (700, 0)):
        assert np.array_equal(shards.read(start, count), tokens[start : start + count])
    with pytest.raises(IndexError, match="tokens 2999 to 3001 of 3000"):
        shards.read(2999, 2)


def test_every_token_is_predicted_once(tmp_path: Path) -> None:
    samples = PackedTokens(TokenShards([write(tmp_path / "a.bin", np.arange(203), "uint16")]), context=20)
    assert len(samples) == 10
    rows = np.stack([samples[index] for index in range(len(samples))])
    assert rows.dtype == np.int64
    assert np.array_equal(rows[:, :-1].ravel(), np.arange(200))
    assert np.array_equal(rows[:, 1:].ravel(), np.arange(1, 201))


def test_a_file_that_is_not_as_it_says_is_refused(tmp_path: Path) -> None:
    odd, wrong = tmp_path / "odd.bin", tmp_path / "wrong.bin"
    odd.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"odd.bin: 3 bytes are no whole number of uint16 tokens"):
        TokenShards([odd])
    write(wrong, np.arange(30), "uint16", header=True)
    wrong.write_bytes(wrong.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"wrong.bin: its header says 30 tokens, and it has 29"):
        TokenShards([wrong])
    with pytest.raises(ValueError, match="dtype must be one of uint8, uint16, uint32, got 'int64'"):
        TokenShards([odd], "int64")
    with pytest.raises(ValueError, match="there is no file of tokens"):
        TokenShards([])
    short = TokenShards([write(tmp_path / "short.bin", np.arange(20), "uint16")])
    with pytest.raises(ValueError, match="has 20 tokens, and a sample needs 21"):
        PackedTokens(short, context=20)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        PackedTokens(short, context=0)


def test_a_copy_for_a_worker_process_is_small_and_reads_the_same(tmp_path: Path) -> None:
    shards = TokenShards([write(tmp_path / "a.bin", np.arange(50_000), "uint32")], "uint32")
    shards.read(0, 10)
    copy = pickle.dumps(shards)
    assert len(copy) < 2000
    again: TokenShards = pickle.loads(copy)  # noqa: S301 - of this test
    assert np.array_equal(again.read(49_990, 10), np.arange(49_990, 50_000))


def test_pages_are_dropped_again(tmp_path: Path) -> None:
    """Otherwise all that was read counts as memory of the process."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(1 << 29)
    shards = TokenShards([path])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    if not Path("/proc/self/statm").is_file():
        pytest.skip("the memory of a process is read from Linux' /proc")
    before = resident()
    for start in range(0, len(shards) - 300, 16_384):
        shards.read(start, 257)
    assert resident() - before < 1 << 27
