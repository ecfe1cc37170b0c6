"""Schedules for momentum and weight decay on the demo, beside constant values.

``python -m benchmarks.schedules`` trains the demo three times with each schedule, with other seeds, and prints the
validation losses.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.demo import SMALL, generate
from benchmarks.record import RESULTS, report
from benchmarks.unhealthy_run import train
from lightning_muon.report import read_run

SEEDS = (42, 43, 44)
# By hyperparameter, the points as HyperparameterSchedule takes them.
SCHEDULES: dict[str, tuple[str, str] | None] = {
    "none: momentum 0.95, weight decay 0.1": None,
    "momentum 0.85 → 0.95 in the first third": ("momentum", "{0: 0.85, 33%: 0.95}"),
    "weight decay 0.1 → 0 in the last third": ("weight_decay", "{67%: 0.1, 100%: 0.0}"),
}
LOSS = "val/loss"


def main(arguments: list[str] | None = None) -> None:
    """Train all runs and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of a small model, to check that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    steps, seeds = (25, SEEDS[:2]) if options.quick else (300, SEEDS)
    quick = [*SMALL, "--trainer.val_check_interval=1.0", "--trainer.limit_val_batches=2"] if options.quick else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        project, module, data = generate(Path(folder))
        for name, schedule in SCHEDULES.items():
            losses = []
            for seed in seeds:
                extra = [*_arguments(schedule), f"--seed_everything={seed}", f"--trainer.max_steps={steps}", *quick]
                log_dir = train(project, module, data, extra)
                losses.append(read_run(log_dir, log_dir.name).scalars[LOSS][-1][1])
                print(f"{name}, seed {seed}: {losses[-1]:.4f}", flush=True)
            # Four digits, since the differences are in the last two.
            shown = {f"seed {seed}": f"{loss:.4f}" for seed, loss in zip(seeds, losses, strict=True)}
            rows.append({"schedule": name, **shown, "mean": f"{statistics.mean(losses):.4f}", "losses": losses})
    settings = {"steps": steps, "quick": options.quick, "metric": LOSS}
    columns = ["schedule", *(f"seed {seed}" for seed in seeds), "mean"]
    report(f"The demo, {steps} steps, {LOSS}", rows, columns, settings, "schedules-cpu", options.results)


def _arguments(schedule: tuple[str, str] | None) -> list[str]:
    if schedule is None:
        return []
    hyperparameter, points = schedule
    return [
        "--trainer.callbacks+=HyperparameterSchedule",
        f"--trainer.callbacks.hyperparameter={hyperparameter}",
        f"--trainer.callbacks.points={points}",
    ]


if __name__ == "__main__":
    main()
