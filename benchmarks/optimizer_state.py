"""Bytes of the optimizer state by ``momentum_dtype``, and what a step takes relative to the default.

``python -m benchmarks.optimizer_state`` steps each optimizer in turns with the default one, in one process. The
parameters have the shapes of GPT-2 small. The gradients are random.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.optimizer_step import Contestant, gpt
from benchmarks.peak_memory import peak_memory
from benchmarks.record import REPOSITORY, RESULTS, report
from benchmarks.stopwatch import seconds
from lightning_muon.optim import MuonAdamW, route_parameters

DEFAULT = "MuonAdamW"
ADAMW = "torch AdamW"
OPTIONS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "bfloat16": {"momentum_dtype": "bfloat16"},
    "int8": {"momentum_dtype": "int8"},
    "NorMuon": {"neuron_beta": 0.95},
    "NorMuon, int8": {"neuron_beta": 0.95, "momentum_dtype": "int8"},
}


def contestant(name: str, build: Callable[[], nn.Module], device: str) -> Contestant:
    """Return an optimizer on a model of its own, after a step."""
    torch.manual_seed(0)
    model = build().to(device)
    if name == ADAMW:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), fused=device == "cpu")
    else:
        optimizer = MuonAdamW(route_parameters(model), **OPTIONS[name])
    made = Contestant([optimizer], {p: torch.randn_like(p) for p in model.parameters()})
    made.prepare()
    made.step()
    return made


def measure(build: Callable[[], nn.Module], device: str, rounds: int) -> list[dict[str, Any]]:
    """Measure each optimizer; the ratio of times is the median over pairs of steps with the default one."""
    reference = contestant(DEFAULT, build, device)
    elements = sum(parameter.numel() for parameter in reference.gradients)
    rows: list[dict[str, Any]] = []
    for name in (ADAMW, *OPTIONS):
        own = reference if name == DEFAULT else contestant(name, build, device)
        peak = peak_memory(own.step, device)
        pairs = [(seconds(reference.step, device), seconds(own.step, device)) for _ in range(rounds)]
        size = own.state_bytes()
        rows.append(
            {
                "optimizer": name,
                "state MB": size / 2**20,
                "bytes per parameter": size / elements,
                "ms": 1e3 * statistics.median(theirs for _, theirs in pairs),
                "× the default's time": statistics.median(theirs / default for default, theirs in pairs),
                "peak MB": None if peak is None else peak / 2**20,
            }
        )
        del own
        gc.collect()
    of_adamw = rows[0]["state MB"]
    return [{**row, "× AdamW's state": row["state MB"] / of_adamw} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_state", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="paired steps of each optimizer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small model, one round, to check that it runs")
    parser.add_argument("--results", type=Path, help="folder for the JSON record")
    options = parser.parse_args(arguments)
    build = partial(gpt, 64, 2, 256) if options.quick else partial(gpt, 768, 12, 50257)
    # --quick gives no valid results, so it must not replace the record.
    results = options.results or (REPOSITORY / "build" / "benchmarks" if options.quick else RESULTS)
    rounds = 1 if options.quick else options.rounds
    rows = measure(build, options.device, rounds)
    columns = [
        "optimizer",
        "state MB",
        "bytes per parameter",
        "× AdamW's state",
        "ms",
        "× the default's time",
        "peak MB",
    ]
    settings = {"rounds": rounds, "quick": options.quick}
    report("GPT-2 small: optimizer state", rows, columns, settings, f"optimizer_state-{options.device}", results)


if __name__ == "__main__":
    main()
