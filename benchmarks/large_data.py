"""Prepare 4 GiB of text, and read batches from it at random: the time and the memory that this takes.

``python -m benchmarks.large_data`` writes 4 GiB of text, makes tokens of it, and reads two thousand batches from it at
random; beside it the same with 4 MiB.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peak_memory import peak_memory
from benchmarks.record import RESULTS, report
from lightning_muon.data import EpochLoader, PackedTokens, prepare_tokens

GIB = 1 << 30
COLUMNS = ["text", "GiB", "prepared, s", "GiB/s", "peak memory of reading, MB", "ms a batch"]


def main(arguments: list[str] | None = None) -> None:
    """Measure both sizes, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small text, to check that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {"small": 1 << 20} if options.quick else {"small": 4 << 20, "large": 4 * GIB}
    batches = 20 if options.quick else 2000
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(name, size, batches, Path(scratch)) for name, size in sizes.items()]
    settings = {"batches": batches, "batch": "16 × 257 bytes", "quick": options.quick}
    report("Text larger than memory", rows, COLUMNS, settings, "large_data-cpu", options.results)


def measure(name: str, size: int, batches: int, folder: Path) -> dict[str, Any]:
    """Write a text, prepare it, and read batches of it."""
    path = folder / f"{name}.txt"
    write(path, size)
    start = time.perf_counter()
    prepared = prepare_tokens([path], folder / "data")
    seconds = time.perf_counter() - start
    path.unlink()
    spent = 0.0

    def read() -> None:
        nonlocal spent
        loader = EpochLoader(PackedTokens(prepared.split("train"), 256), 16)
        begin = time.perf_counter()
        for number, _ in enumerate(loader, start=1):
            if number == batches:
                break
        spent = time.perf_counter() - begin

    peak = peak_memory(read, "cpu")
    return {
        "text": name,
        "GiB": size / GIB,
        "prepared, s": seconds,
        "GiB/s": size / GIB / seconds,
        "peak memory of reading, MB": None if peak is None else peak / 2**20,
        "ms a batch": 1e3 * spent / batches,
    }


def write(path: Path, size: int) -> None:
    """Write lines of random letters."""
    generator = torch.Generator().manual_seed(0)
    piece = torch.randint(97, 123, (1 << 20,), generator=generator, dtype=torch.uint8)
    piece[::64] = ord("\n")
    with path.open("wb") as file:
        for _ in range(max(1, size >> 20)):
            file.write(piece.roll(1).numpy().tobytes())


if __name__ == "__main__":
    main()
