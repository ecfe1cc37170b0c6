"""Variants of the recipe on the demo, each with several seeds.

``python -m benchmarks.variants`` trains the demo with each variant and seed, and prints the validation losses. With
``--jobs 2`` two runs share the cores.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import SMALL, generate
from benchmarks.record import RESULTS, report
from benchmarks.sick_runs import train
from lightning_muon.report import read_run

SEEDS = (42, 43, 44)
OPTIMIZER = "--model.optimizer.init_args"


def _preset(name: str) -> list[str]:
    return [f"--config=configs/optimizer/{name}.yaml"]


def _callback(name: str, **arguments: object) -> list[str]:
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{k}={v}" for k, v in arguments.items())]


VARIANTS: dict[str, list[str]] = {
    "default": [],
    "default, half its learning rate": [f"{OPTIMIZER}.lr=0.01"],
    "default, twice its learning rate": [f"{OPTIMIZER}.lr=0.04"],
    "`roles`": _preset("roles"),
    "`fixed_norm`": _preset("fixed_norm"),
    "`per_head`": _preset("per_head"),
    # In place of the default's AutoWeightDecay, of which a trainer takes one.
    "`AutoWeightDecay(target_rms=0.06, per=matrix)`": [
        "--trainer.callbacks=[]",
        *_callback("AutoWeightDecay", target_rms=0.06, per="matrix", horizon=20, ramp_steps=20, bounds="[0, 4]"),
    ],
    "state in bfloat16": [f"{OPTIMIZER}.momentum_dtype=bfloat16"],
    "`int8`": _preset("int8"),
    "momentum 0.85 → 0.95 in the first third": _callback(
        "HyperparameterSchedule", hyperparameter="momentum", points="{0: 0.85, 33%: 0.95}"
    ),
    "weight decay 0.1 → 0 in the last third": _callback(
        "HyperparameterSchedule", hyperparameter="weight_decay", points="{67%: 0.1, 100%: 0.0}"
    ),
}
LOSS = "val/loss"


def main(arguments: list[str] | None = None) -> None:
    """Train all runs and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="few steps of a small model, to check that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    steps, seeds = (25, SEEDS[:1]) if options.quick else (300, SEEDS)
    quick = [*SMALL, "--trainer.val_check_interval=1.0", "--trainer.limit_val_batches=2"] if options.quick else []
    runs = [
        [*extra, f"--seed_everything={seed}", f"--trainer.max_steps={steps}", *quick]
        for extra in VARIANTS.values()
        for seed in seeds
    ]
    settings = {"steps": steps, "quick": options.quick, "metric": LOSS}
    columns = ["variant", *(f"seed {seed}" for seed in seeds), "mean", "gain"]
    rows: list[dict[str, Any]] = []
    found = _all_losses(runs, options.jobs)
    for name in VARIANTS:
        losses = list(itertools.islice(found, len(seeds)))
        # Four digits, since the differences are in the last two.
        shown = {f"seed {seed}": f"{loss:.4f}" for seed, loss in zip(seeds, losses, strict=True)}
        mean = statistics.mean(losses)
        gain = (statistics.mean(rows[0]["losses"]) if rows else mean) - mean
        rows.append({"variant": name, **shown, "mean": f"{mean:.4f}", "gain": f"{gain:+.4f}", "losses": losses})
        # After each variant: it takes an hour, and what was measured is not to be lost.
        report(f"The demo, {steps} steps, {LOSS}", rows, columns, settings, "variants-cpu", options.results)


def _all_losses(runs: Sequence[list[str]], jobs: int) -> Iterator[float]:
    """Yield the losses of runs in their order, several runs at a time."""
    if jobs == 1:
        yield from map(_loss, runs)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        yield from pool.map(_loss, runs)


def _loss(arguments: list[str]) -> float:
    """Train the demo in a project of its own, and return the last validation loss."""
    with tempfile.TemporaryDirectory() as folder:
        project, module, data = generate(Path(folder))
        log_dir = train(project, module, data, arguments)
        loss = float(read_run(log_dir, log_dir.name).scalars[LOSS][-1][1])
    print(f"{' '.join(arguments)}: {loss:.4f}", flush=True)
    return loss


if __name__ == "__main__":
    main()
