"""The generated project whose commands ``compare`` and ``sweep`` the experiments run, as its user would."""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.demo import generate
from benchmarks.record import REPOSITORY, RESULTS, card, machine, write
from lightning_muon.cli import main as program
from lightning_muon.cli.compare import run_compare
from lightning_muon.cli.optimizer_settings import optimizer_settings
from lightning_muon.cli.sweep import run_sweep
from lightning_muon.experiments.journal import Journal
from lightning_muon.experiments.output import VALUES
from lightning_muon.experiments.ratio import mean_interval
from lightning_muon.experiments.sweep import TRIALS

IMAGES = REPOSITORY / "docs" / "images"
# A model and a run that take a second.
QUICK = (
    "--model.net.depth=1",
    "--model.net.dim=32",
    "--model.net.heads=1",
    "--model.context=16",
    "--data.batch_size=2",
    "--trainer.max_steps=4",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
)

_PACKAGE = "my_muon_project"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all experiments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "embedded_text", help="project and runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="few runs of few steps, to check that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the plots")
    return parser


def compare(folder: Path, command: Sequence[str]) -> dict[str, Any]:
    """Run the command ``compare`` and return the content of its ``comparison.json``."""
    with _project_in(folder) as (run, classes):
        run_compare(run, partial(optimizer_settings, *classes), [f"--study={folder / 'study'}", *command])
    outcome: dict[str, Any] = json.loads((folder / "study" / VALUES).read_text(encoding="utf-8"))
    return outcome


def sweep(folder: Path, varied: Mapping[str, Sequence[Any]], command: Sequence[str]) -> list[dict[str, Any]]:
    """Run the command ``sweep`` over all combinations of values, by their keys, and return its trials."""
    vary = [f"--vary={key}={','.join(map(json.dumps, values))}" for key, values in varied.items()]
    with _project_in(folder) as (run, _):
        run_sweep(run, [f"--study={folder / 'study'}", *vary, *command])
    trials: list[dict[str, Any]] = json.loads((folder / "study" / TRIALS).read_text(encoding="utf-8"))
    return trials


def by_seed(trials: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return the trials that have these options, by their seeds."""
    chosen = [trial for trial in trials if options.items() <= trial["options"].items()]
    return {trial["options"]["seed_everything"]: trial for trial in sorted(chosen, key=lambda one: one["name"])}


def compared(own: Mapping[int, Any], reference: Mapping[int, Any], words: str) -> dict[str, str]:
    """Return the columns of a loss, and of how much more it is than another of the same seeds."""
    more = [own[seed]["value"] - reference[seed]["value"] for seed in own]
    return {
        "val/loss": _interval([trial["value"] for trial in own.values()]),
        f"more than {words}": "" if own == reference else _interval(more),
    }


def _interval(values: Sequence[float]) -> str:
    found = mean_interval(values)
    half = math.inf if found.high is None or found.value is None else found.high - found.value
    return f"{statistics.fmean(values):.4f} ± {half:.4f}"


def write_config(folder: Path, name: str, text: str) -> str:
    """Write ``<folder>/<name>.yaml`` and return its path, as a value of ``--config``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(f"{text}\n", encoding="utf-8")
    return str(path)


def write_record(options: argparse.Namespace, name: str, title: str, folder: Path, content: dict[str, Any]) -> Path:
    """Write ``<options.results>/<name>-<card or cpu>.json``: machine, threads of a run, date, hours of all runs."""
    journal = Journal(folder / "study")
    with journal.locked():
        done = [record.result for record in journal.records() if record.result]
    hours = sum(result.steps * (result.seconds_per_step or 0.0) for result in done) / 3600
    path: Path = options.results / f"{name}-{card()}.json"
    measured_on = machine()
    measured_on["threads"] = max(1, measured_on["threads"] // options.jobs)  # runs at the same time share the cores
    about = {"command": f"python -m {__package__}.{name.replace('-', ' --size ')}", "machine": measured_on}
    about["date"] = datetime.now(timezone.utc).date().isoformat()
    write(path, {"title": title, **about, "runs": len(done), "hours of training": round(hours, 2), **content})
    print(f"record:     {path}")
    return path


@contextmanager
def _project_in(folder: Path) -> Iterator[tuple[Any, tuple[str, str, Path]]]:
    """Generate the project, unless it is there, and work in it: its command line as a function, and its classes."""
    project = folder / "my-muon-project"
    if not project.exists():
        generate(folder)
    classes = (f"{_PACKAGE}.module.TextModule", f"{_PACKAGE}.data.TextData", project / "configs" / "default.yaml")
    before = Path.cwd()
    os.chdir(project)  # its data go into a folder there
    sys.path.insert(0, str(project / "src"))
    try:
        yield partial(_run, *classes), classes
    finally:
        sys.path.remove(str(project / "src"))
        os.chdir(before)


def _run(module: str, data: str, default_config: Path, command: list[str]) -> None:
    program(module, data, default_config=default_config, args=command)
