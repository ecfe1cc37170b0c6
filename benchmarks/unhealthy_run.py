"""An unhealthy run, beside a healthy one and one that ``AutoWeightDecay`` corrects.

``python -m benchmarks.unhealthy_run`` trains the demo three times and prints what the monitors logged.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo import SMALL, generate, inside
from benchmarks.record import RESULTS, report
from lightning_muon.cli import MuonCLI
from lightning_muon.report import read_run

STEERED = {"target_rms": 0.2, "horizon": 20, "ramp_steps": 20, "bounds": "[0, 4]"}
UNHEALTHY = ["--config=configs/experiment/unhealthy.yaml"]
RUNS = {
    "default": [],
    "unhealthy": UNHEALTHY,
    "unhealthy, AutoWeightDecay(target_rms=0.2)": [
        *UNHEALTHY,
        "--trainer.callbacks+=AutoWeightDecay",
        *(f"--trainer.callbacks.{name}={value}" for name, value in STEERED.items()),
    ],
}
FIGURES: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "validation loss": ("val/loss", lambda values: values[-1]),
    "weight RMS, mean, final": ("weight_rms/mean", lambda values: values[-1]),
    "weight RMS, largest, peak": ("weight_rms/max", max),
    "output RMS, largest, peak": ("output_rms/max", max),
    "lost updates, mean, median": ("lost_updates/mean", statistics.median),
    "lost updates, largest, median": ("lost_updates/max", statistics.median),
}


def main(arguments: list[str] | None = None) -> None:
    """Train the three runs and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of a small model, to check that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    steps = 25 if options.quick else 300
    quick = [*SMALL, "--trainer.val_check_interval=1.0", "--trainer.limit_val_batches=2"] if options.quick else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        project, module, data = generate(Path(folder))
        config = project / "configs" / "default.yaml"  # of the float32 run too: what bfloat16 would lose
        config.write_text(config.read_text().replace("outputs: blocks", "as_if_bf16: true\n        outputs: blocks", 1))
        for name, extra in RUNS.items():
            log_dir = train(project, module, data, [*extra, f"--trainer.max_steps={steps}", *quick])
            rows.append({"run": name, **figures(log_dir)})
    settings = {"steps": steps, "quick": options.quick}
    report(f"The demo, {steps} steps", rows, ["run", *FIGURES], settings, "unhealthy_run-cpu", options.results)


def train(project: Path, module: type[Any], data: type[Any], arguments: list[str]) -> Path:
    """Train the demo's model and return its log folder."""
    in_project = [argument.replace("configs/", f"{project / 'configs'}/") for argument in arguments]
    run = MuonCLI(
        module, data, default_config=project / "configs" / "default.yaml", args=["fit", *in_project, *inside(project)]
    )
    for logger in run.trainer.loggers:
        logger.finalize("success")
    return Path(str(run.trainer.log_dir))


def figures(log_dir: Path) -> dict[str, float]:
    """Return the figures of a run."""
    scalars = read_run(log_dir, log_dir.name).scalars
    return {name: reduce([value for _, value in scalars[tag]]) for name, (tag, reduce) in FIGURES.items()}


if __name__ == "__main__":
    main()
