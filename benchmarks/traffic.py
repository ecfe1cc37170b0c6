"""Bytes and collectives of an optimizer step on several processes, beside those of a full all-gather.

``python -m benchmarks.traffic`` starts processes on this machine (gloo, CPU) and counts their calls of
torch.distributed.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.optimizer_step import gpt
from benchmarks.record import REPOSITORY, RESULTS, report
from lightning_muon.optim import MuonAdamW, route_parameters

WIDTH, DEPTH, VOCABULARY = 256, 4, 256
WAYS = ("ddp", "ddp, sharded state", "fsdp2", "hsdp")
COLUMNS = ["strategy", "processes", "wire", "collectives", "MB sent by a rank"]
COLUMNS += ["there and back, W ranks, MB", "all-gather instead, MB"]


@dataclass
class Traffic:
    """The bytes that a rank has sent to others, and the number of collectives."""

    sent: int = 0
    collectives: int = 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the traffic of this rank inside the context."""
    traffic = Traffic()

    def watch(collective: Callable[..., Any], sent: Callable[..., int]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            group = options.get("group")
            traffic.collectives += 1
            traffic.sent += sent(arguments, dist.get_rank(group), dist.get_world_size(group))
            return collective(*arguments, **options)

        return call

    def all_to_all(arguments: tuple[Any, ...], rank: int, _: int) -> int:
        _, packed, _, outgoing = arguments
        return int((sum(outgoing) - outgoing[rank]) * packed.element_size())

    def all_gather(arguments: tuple[Any, ...], _: int, size: int) -> int:
        return int((size - 1) * arguments[1].nbytes)

    def all_reduce(arguments: tuple[Any, ...], _: int, size: int) -> int:
        return int(2 * (size - 1) * arguments[0].nbytes // size)  # a ring all-reduce

    with (
        patch.object(dist, "all_to_all_single", watch(dist.all_to_all_single, all_to_all)),
        patch.object(dist, "all_gather_into_tensor", watch(dist.all_gather_into_tensor, all_gather)),
        patch.object(dist, "all_reduce", watch(dist.all_reduce, all_reduce)),
    ):
        yield traffic


def spread(model: nn.Module, way: str) -> nn.Module:
    """Shard or replicate a model over all processes."""
    world_size = dist.get_world_size()
    if way.startswith("ddp"):
        return DistributedDataParallel(model)
    shape, names = ((2, world_size // 2), ("replicate", "shard")) if way == "hsdp" else ((world_size,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for part in list(model.modules()):
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def measure(way: str, wire: str) -> Traffic:
    """Return the traffic of one optimizer step on the parameters of a GPT."""
    torch.manual_seed(0)
    model = spread(_untied(gpt(WIDTH, DEPTH, VOCABULARY)), way)
    options: dict[str, Any] = {"communication_dtype": wire, "shard_state": way == "ddp, sharded state"}
    optimizer = MuonAdamW(route_parameters(model), **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with counted() as traffic:
        optimizer.step()
    return traffic


def _untied(model: nn.Module) -> nn.Module:
    model.head = nn.Linear(WIDTH, VOCABULARY, bias=False)  # FSDP cannot shard a tied head alone
    return model


def _matrix_elements() -> int:
    groups = route_parameters(_untied(gpt(WIDTH, DEPTH, VOCABULARY)))
    return sum(p.numel() for group in groups if group["algorithm"] == "muon" for p in group["params"])


def _process(rank: int, world_size: int, folder: str, ways: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{world_size}", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    rows = []
    for way in ways:
        for wire in ("bfloat16", "float32"):
            traffic = measure(way, wire)
            most = torch.tensor(traffic.sent)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            rows.append((way, wire, traffic.collectives, int(most)))
    if rank == 0:
        torch.save(rows, f"{folder}/rows-{world_size}")
    dist.barrier()
    os._exit(0)  # else gloo's threads may abort the process at exit; all files are written


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--quick", action="store_true", help="two processes, to check that it runs")
    parser.add_argument("--results", type=Path, help="folder for the JSON record")
    options = parser.parse_args(arguments)
    elements, rows = _matrix_elements(), []
    for world_size in [2] if options.quick else options.processes:
        ways = [way for way in WAYS if way != "hsdp" or world_size % 2 == 0]
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_process, (world_size, folder, ways), nprocs=world_size, start_method="forkserver")
            counted_rows = torch.load(f"{folder}/rows-{world_size}")
        for way, wire, collectives, sent in counted_rows:
            ranks = world_size // 2 if way == "hsdp" else world_size
            megabytes = elements * (2 if wire == "bfloat16" else 4) / 2**20
            row = {"strategy": way, "processes": world_size, "wire": wire, "collectives": collectives}
            row["MB sent by a rank"] = sent / 2**20
            if not way.startswith("ddp"):
                row["there and back, W ranks, MB"] = 2 * megabytes * (ranks - 1) / ranks**2
                row["all-gather instead, MB"] = megabytes * (ranks - 1) / ranks
            rows.append(row)
    # --quick gives a part of the table only, so it must not replace the record.
    results = options.results or (REPOSITORY / "build" / "benchmarks" if options.quick else RESULTS)
    settings = {"quick": options.quick, "width": WIDTH, "depth": DEPTH, "elements of matrices": elements}
    report("What a step sends", rows, COLUMNS, settings, "traffic-cpu", results)


if __name__ == "__main__":
    main()
