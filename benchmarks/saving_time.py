"""How long a save takes, and how long it stops training, for a model of 100 million parameters.

``python -m benchmarks.saving_time`` saves the weights and AdamW's two moments as one file and, on two processes, as a
folder: as Lightning does, by the atomic classes, and in the background.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.record import RESULTS, report
from lightning_muon.strategies import AsyncAtomicCheckpointIO, AtomicCheckpointIO
from lightning_muon.strategies.checkpoint_folder import split_checkpoint, write_checkpoint_folder
from lightning_muon.strategies.checkpoint_io import snapshot
from lightning_muon.strategies.integrity import damage_of

PARAMETERS, LAYERS = 100_000_000, 25
COLUMNS = ["checkpoint", "saved by", "training stops, s", "complete after, s", "GB", "check on load, s"]

# Saves once, and returns a function that waits until it is complete.
Save = Callable[[], Callable[[], None]]


def main(arguments: list[str] | None = None) -> None:
    """Measure each way, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to check that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each way; the median is shown")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    parameters, rounds = (100_000, 1) if options.quick else (PARAMETERS, options.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        # Forked first: this process has no threads yet.
        record = Path(scratch, "rows")
        ranks = (parameters, rounds, Path(scratch), record)
        torch.multiprocessing.start_processes(of_a_folder, ranks, nprocs=2, start_method="fork")
        torch.set_num_threads(1)  # a copy is bound by the memory
        rows = [*of_one_file(parameters, rounds, Path(scratch)), *torch.load(record)]
    settings = {"parameters": parameters, "rounds": rounds, "quick": options.quick}
    report("Saving weights and AdamW's moments", rows, COLUMNS, settings, "saving_time-cpu", options.results)


def checkpoint_of(parameters: int, place: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Return a checkpoint with float32 weights and two moments of each, in square-like matrices."""
    shape = (1000, parameters // LAYERS // 1000)
    weights = {f"layers.{layer}.weight": place(torch.randn(shape)) for layer in range(LAYERS)}
    state = {name: {"exp_avg": weight.clone(), "exp_avg_sq": weight.clone()} for name, weight in weights.items()}
    groups = [{"params": list(weights), "lr": 0.1}]
    return {"global_step": 1, "state_dict": weights, "optimizer_states": [{"state": state, "param_groups": groups}]}


def of_one_file(parameters: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Measure the ways to save one file."""
    checkpoint = checkpoint_of(parameters, lambda tensor: tensor)
    path = folder / "last.ckpt"
    ways = {
        "Lightning, not synced": TorchCheckpointIO,
        "atomic": AtomicCheckpointIO,
        "Lightning, asynchronous, not synced": AsyncCheckpointIO,
        "asynchronous": AsyncAtomicCheckpointIO,
    }
    rows = []
    for name, make in ways.items():
        plugin: Any = make(TorchCheckpointIO()) if make is AsyncCheckpointIO else make()

        def begin(plugin: Any = plugin) -> Callable[[], None]:
            plugin.save_checkpoint(checkpoint, path)
            wait: Callable[[], None] = plugin.teardown
            return wait

        rows.append({"checkpoint": "one file", "saved by": name, **measured(begin, rounds, path)})
        path.unlink()
    return rows


def of_a_folder(rank: int, parameters: int, rounds: int, scratch: Path, record: Path) -> None:
    """Measure the ways to save a folder, on one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(scratch / "store"), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    checkpoint = checkpoint_of(parameters, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    path = scratch / "folder.ckpt"
    background = dist.new_group(backend="gloo")
    plugin = AsyncAtomicCheckpointIO()

    def in_place() -> Callable[[], None]:
        tensors, rest = split_checkpoint(checkpoint)
        save(tensors, checkpoint_id=path)
        if rank == 0:
            torch.save(rest, path / "meta.pt")
        return dist.barrier

    def atomic() -> Callable[[], None]:
        write_checkpoint_folder(checkpoint, path)
        return dist.barrier

    def asynchronous() -> Callable[[], None]:
        plugin.join()
        plugin.start(partial(write_checkpoint_folder, snapshot(checkpoint), path, background))
        return plugin.join

    warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
    rows = []
    for name, begin in {"Lightning, synced": in_place, "atomic": atomic, "asynchronous": asynchronous}.items():
        rows.append({"checkpoint": "folder, 2 ranks", "saved by": name, **measured(begin, rounds, path)})
        dist.barrier()
        if rank == 0:
            shutil.rmtree(path)
        dist.barrier()
    if rank == 0:
        torch.save(rows, record)
    dist.barrier()
    dist.destroy_process_group()


def measured(begin: Save, rounds: int, path: Path) -> dict[str, Any]:
    """Save several times, each over the one before, and return the medians."""
    pauses, totals = [], []
    for _ in range(rounds + 1):
        if dist.is_initialized():
            dist.barrier()
        os.sync()  # what the save before has left to the operating system
        started = time.perf_counter()
        wait = begin()
        pauses.append(time.perf_counter() - started)
        wait()
        totals.append(time.perf_counter() - started)
    files = [path] if path.is_file() else list(path.iterdir())
    started = time.perf_counter()
    if (damage := damage_of(path)) is not None:
        raise RuntimeError(damage)
    checked = time.perf_counter() - started
    return {
        "training stops, s": statistics.median(pauses[1:]),
        "complete after, s": statistics.median(totals[1:]),
        "GB": sum(file.stat().st_size for file in files) / 1e9,
        "check on load, s": checked,
    }


if __name__ == "__main__":
    main()
