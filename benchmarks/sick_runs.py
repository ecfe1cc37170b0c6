"""A healthy run and three that go wrong, each in one picture, and one of these that ``AutoWeightDecay`` steers.

``python -m benchmarks.sick_runs`` trains the demo by the presets of ``configs/experiment``, prints what the monitors
logged, and writes ``docs/images/health-<run>.png`` and ``curves.png``.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.demo import generate, inside
from benchmarks.record import REPOSITORY, RESULTS, report
from lightning_muon.cli import MuonCLI
from lightning_muon.report import compare, read_run, write_report
from lightning_muon.report.verdict import health_of

STEERED = {"target_rms": 0.2, "horizon": 20, "ramp_steps": 20, "bounds": "[0, 4]"}
# What is wrong shows as early as in the demo itself, which takes ten times as long. Batches have their size by preset.
SMALLER = ["--model.net.depth=2", "--model.context=64", "--trainer.val_check_interval=30"]
SMALLER += ["--trainer.limit_val_batches=4"]
RUNS = {
    "healthy": [],
    "large_weights": ["--config=configs/experiment/large_weights.yaml"],
    "steered": [
        "--config=configs/experiment/large_weights.yaml",
        "--trainer.callbacks+=AutoWeightDecay",
        *(f"--trainer.callbacks.{name}={value}" for name, value in STEERED.items()),
    ],
    "lost_rank": ["--config=configs/experiment/lost_rank.yaml"],
    "rates_apart": ["--config=configs/experiment/rates_apart.yaml"],
}
FIGURES: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "validation loss": ("val/loss", lambda values: values[-1]),
    "weight RMS, mean, final": ("weight_rms/mean", lambda values: values[-1]),
    "output RMS, largest, peak": ("output_rms/max", max),
    "lost updates, mean, median": ("lost_updates/mean", statistics.median),
    "orthogonality error, mean, median": ("orthogonality_error/mean", statistics.median),
    "ratio of rates, median": ("rate_ratio", statistics.median),
}


def main(arguments: list[str] | None = None) -> None:
    """Train the runs, and write the record and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the steps")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--images", type=Path, default=REPOSITORY / "docs" / "images", help="folder of the pictures")
    parser.add_argument("--logs", type=Path, help="folder to keep the runs in, for TensorBoard")
    options = parser.parse_args(arguments)
    steps = 64 if options.quick else 120
    small = [*SMALLER, f"--trainer.max_steps={steps}", "--trainer.log_every_n_steps=5"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        project, module, data = generate(Path(folder))
        for name, preset in RUNS.items():
            log_dir = train(project, module, data, [*preset, *small, f"--trainer.logger.init_args.version={name}"])
            rows.append({"run": name, **figures(log_dir)})
            options.images.mkdir(parents=True, exist_ok=True)
            copy_image(log_dir / "health.png", options.images / f"health-{name}.png")
            if options.logs is not None:
                shutil.copytree(log_dir, options.logs / name, ignore=shutil.ignore_patterns("checkpoints"))
        write_report(compare([project / "logs"], limit=len(RUNS)), project / "report")
        copy_image(project / "report" / "curves.png", options.images / "curves.png")
    columns = ["run", "verdict", *FIGURES]
    settings = {"steps": steps, "quick": options.quick}
    report(f"The demo with a smaller model, {steps} steps", rows, columns, settings, "sick_runs-cpu", options.results)


def train(project: Path, module: type[Any], data: type[Any], arguments: list[str]) -> Path:
    """Train the demo's model and return its log folder."""
    in_project = [argument.replace("configs/", f"{project / 'configs'}/") for argument in arguments]
    run = MuonCLI(
        module, data, default_config=project / "configs" / "default.yaml", args=["fit", *in_project, *inside(project)]
    )
    for logger in run.trainer.loggers:
        logger.finalize("success")
    return Path(str(run.trainer.log_dir))


def copy_image(image: Path, to: Path) -> None:
    """Copy a picture with as many colours as it needs, in less than half of the bytes."""
    Image.open(image).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(to, optimize=True)


def figures(log_dir: Path) -> dict[str, Any]:
    """Return the verdict on a run, with the worst quantity, and its figures; ``None`` for what it did not log."""
    run = read_run(log_dir, log_dir.name)
    health = health_of(run)
    found: dict[str, Any] = {"verdict": ": ".join([health.verdict, *(one.name for one in health.unhealthy[:1])])}
    for name, (tag, reduce) in FIGURES.items():
        found[name] = reduce(run.values(tag)) if tag in run.scalars else None
    return found


if __name__ == "__main__":
    main()
