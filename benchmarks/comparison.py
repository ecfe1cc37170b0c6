"""Optimizers on the embedded text, each tuned by the same rules, at two sizes and with a mixture of experts.

``python -m benchmarks.comparison --size 1m`` runs the command ``compare`` in a generated project, writes its outcome to
the record, and its plots to ``docs/images``. It takes hours: killed, it goes on in ``--folder`` where it was.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from benchmarks.demo import generate
from benchmarks.record import REPOSITORY, RESULTS, machine, write
from lightning_muon.cli import main as program
from lightning_muon.cli.compare import run_compare
from lightning_muon.cli.optimizer_settings import optimizer_settings
from lightning_muon.experiments.journal import Journal
from lightning_muon.experiments.output import HORIZONS, TUNING, VALUES

IMAGES = REPOSITORY / "docs" / "images"
PACKAGE = "my_muon_project"


@dataclass(frozen=True)
class Size:
    """A comparison.

    Args:
        optimizers: The first is the baseline.
        tuned: What is tuned.
        seeds: How many.
        arguments: Of ``fit``, over the defaults of the project: 853 thousand parameters, 300 steps of 2048 tokens.
    """

    optimizers: Sequence[str]
    tuned: Sequence[str]
    seeds: int = 4
    arguments: Sequence[str] = ()


ALL = ("adamw", "adam", "moonlight", "fast", "normuon", "int8", "fixed_norm", "polargrad", "soap")
SIZES: Mapping[str, Size] = {
    "1m": Size(ALL, ("lr", "roles", "embedding", "head", "weight_decay")),
    # A narrower tuning, fewer optimizers, seeds and tokens: a run costs several times as much.
    "8m": Size(
        ("adamw", "soap", "moonlight", "fast", "polargrad"),
        ("lr", "roles"),
        seeds=3,
        arguments=(
            "--model.net.dim=320",
            "--model.net.depth=6",
            "--model.net.heads=5",
            "--data.batch_size=8",
            "--trainer.max_steps=200",
        ),
    ),
    "moe": Size(("adamw", "moonlight"), ("lr", "roles"), seeds=3, arguments=("--model.net.experts=4",)),
}
QUICK = (
    "--model.net.depth=1",
    "--model.net.dim=16",
    "--model.net.heads=1",
    "--model.context=16",
    "--data.batch_size=2",
)


def main(arguments: list[str] | None = None) -> None:
    """Run a comparison, or go on with it, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES], default="1m")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "comparison", help="project and study")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--quick", action="store_true", help="two optimizers, 4 steps, no tuning, to check that it runs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the plots")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    if options.quick:
        size = Size(size.optimizers[:2], (), 2, (*QUICK, "--trainer.max_steps=4", "--trainer.limit_val_batches=1"))
    folder = options.folder.absolute() / options.size
    project = folder / "my-muon-project"
    if not project.exists():
        generate(folder)
    study = compared(project, folder / "study", size, options.jobs)
    name = f"comparison-{options.size}"
    outcome = json.loads((study / VALUES).read_text(encoding="utf-8"))
    date = datetime.now(timezone.utc).date().isoformat()
    details = {"date": date, "machine": machine(), "jobs": options.jobs, "hours": hours_of(study)}
    write(options.results / f"{name}-cpu.json", {"title": size_in_words(size), **details, **outcome})
    options.images.mkdir(parents=True, exist_ok=True)
    for plot in (HORIZONS, TUNING):
        shutil.copyfile(study / plot, options.images / f"{name}-{plot}".replace("_", "-"))


def compared(project: Path, study: Path, size: Size, jobs: int) -> Path:
    """Run the command ``compare`` of a project as its user would, and return the folder of the study."""
    classes = (f"{PACKAGE}.module.TextModule", f"{PACKAGE}.data.TextData", project / "configs" / "default.yaml")
    command = [
        f"--optimizers={','.join(size.optimizers)}",
        f"--tune={','.join(size.tuned)}",
        f"--seeds={size.seeds}",
        f"--study={study}",
        f"--jobs={jobs}",
        *size.arguments,
    ]
    before = Path.cwd()
    os.chdir(project)  # its data go into a folder there
    sys.path.insert(0, str(project / "src"))
    try:
        run_compare(partial(_run, *classes), partial(optimizer_settings, *classes), command)
    finally:
        sys.path.remove(str(project / "src"))
        os.chdir(before)
    return study


def hours_of(study: Path) -> float:
    """Return the hours that the runs took, all together, without their starts and validations."""
    journal = Journal(study)
    with journal.locked():
        results = [record.result for record in journal.records() if record.result]
    return sum(result.steps * (result.seconds_per_step or 0.0) for result in results) / 3600


def size_in_words(size: Size) -> str:
    """Return the title of the record."""
    return f"The demo {' '.join(size.arguments)}: {', '.join(size.optimizers)}; tuned: {', '.join(size.tuned)}"


def _run(module: str, data: str, default_config: Path, command: list[str]) -> None:
    program(module, data, default_config=default_config, args=command)


if __name__ == "__main__":
    main()
