"""Measure everything that needs a GPU: ``python -m benchmarks.gpu``.

Each section runs in a process of its own and has its part of the time; what it leaves goes to the later ones. The
record is written after each measurement, so that a run that is killed leaves what it has measured. The exit code is 1
if a section, one of its measurements, or a test has failed.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.goals import reached
from benchmarks.gpu.lightning_runs import measure_monitors, measure_strategies
from benchmarks.gpu.marked_tests import run_tests
from benchmarks.gpu.measuring import Row
from benchmarks.gpu.optimizer_steps import measure_steps
from benchmarks.gpu.polar_factors import measure_methods
from benchmarks.gpu.processes import GRACE, Section, run_section
from benchmarks.gpu.training import measure_memory, measure_training
from benchmarks.record import REPOSITORY, RESULTS, card, print_table, record, write


class Part(NamedTuple):
    """A section, what it measures, and its seconds of nine minutes."""

    section: Section
    title: str
    seconds: float


SECTIONS = {
    "tests": Part(run_tests, "Tests marked gpu", 110),
    "step": Part(measure_steps, "Optimizer step, GPT-2 small", 80),
    "training": Part(measure_training, "Training step, GPT-2 small, bf16-mixed", 120),
    "memory": Part(measure_memory, "Peak memory of the training step, GPT-2 small", 40),
    "monitors": Part(measure_monitors, "Monitors, GPT-2 small, default configuration", 60),
    "strategies": Part(measure_strategies, "Sharding strategies on one device", 50),
    # The last one takes the time that the others leave.
    "polar": Part(measure_methods, "Polar factors, beside the floor of their FLOPs", 60),
}
RESERVE = 15.0  # seconds of the whole time for the imports before the first section, and for the tables


class Record:
    """The record of a run, written after each change.

    Args:
        path: Its file.
        device: Device of the run.
        settings: For the file.
    """

    def __init__(self, path: Path, device: str, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.content = record("Measured on a GPU" if device == "cuda" else "A GPU's benchmark", self.rows, settings)
        self.content["sections"] = {}
        if device != "cuda":
            self.content["machine"]["gpu"] = None

    def begin(self, name: str) -> None:
        """Note that a section has begun."""
        self.content["sections"][name] = {"status": "unfinished", "failures": []}
        self.write()

    def add(self, name: str, kind: str, found: Row) -> None:
        """Add a row or a failure of a section."""
        if kind == "row":
            self.rows.append({"section": name, **found})
        else:
            self.content["sections"][name]["failures"].append(found)
            print(f"FAILED: {name}, {found['what']}\n{found['traceback']}", flush=True)
        self.write()

    def end(self, name: str, status: str, seconds: float) -> None:
        """Note how a section has ended."""
        self.content["sections"][name].update(status=status, seconds=round(seconds, 1))
        self.content["goals"] = reached(self.rows)
        self.write()

    def write(self) -> None:
        """Write the file."""
        write(self.path, self.content)

    def has_failed(self) -> bool:
        """Return whether a section has failed."""
        return any(section["status"].startswith("failed") for section in self.content["sections"].values())

    def show(self) -> None:
        """Print everything as tables, the longest first: of a log one sees the end."""
        for name, section in reversed(self.content["sections"].items()):
            rows = [row for row in self.rows if row["section"] == name]
            columns = list(dict.fromkeys(key for row in rows for key in row if key not in {"section", *HIDDEN}))
            if rows:
                print_table(f"{SECTIONS[name].title}: {section['status']}", rows, columns)
        sections = [{"section": name, **section} for name, section in self.content["sections"].items()]
        print_table("Sections", sections, ["section", "status", "seconds"])
        if self.content.get("goals"):
            print_table("Goals, for one data-centre GPU", self.content["goals"], ["goal", "measured", "reached"])
        print(f"The record is {self.path}")


# Columns that say again what the first one says.
HIDDEN = {"model", "optimizer", "strategy", "precision", "shape", "method", "rounds"}


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="sections to run (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole run takes at most this long")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny forms, to check that everything runs")
    parser.add_argument("--results", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device: add --device cpu --tiny to check that everything runs")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the sizes are those of a data-centre GPU")

    # A part of the measurements must not replace the record of all.
    is_whole = options.device == "cuda" and not options.tiny and not options.only
    folder = options.results or (RESULTS if is_whole else REPOSITORY / "build" / "benchmarks")
    chosen = [name for name in SECTIONS if name in (options.only or SECTIONS)]
    settings = {"minutes": options.minutes, "device": options.device, "quick": options.tiny, "sections": chosen}
    path = folder / f"gpu-{card() if options.device == 'cuda' else 'cpu'}.json"
    written = Record(path, options.device, settings)
    run_sections(written, chosen, options)
    written.show()
    return int(written.has_failed())


def run_sections(written: Record, chosen: list[str], options: argparse.Namespace) -> None:
    """Run sections one after the other, each until the end of its part of the time."""
    start, available = time.time(), 60 * options.minutes - RESERVE
    parts = sum(SECTIONS[name].seconds for name in chosen)
    planned = 0.0
    for name in chosen:
        begun = time.time()
        planned += SECTIONS[name].seconds / parts * available
        deadline = start + planned
        kill_at = min(deadline + GRACE, start + available)
        print(f"--- {name}: {SECTIONS[name].title}, at most {max(0.0, deadline - begun):.0f} s", flush=True)
        written.begin(name)
        if deadline <= begun:
            status = f"skipped: the {options.minutes:g} minutes were over"
        else:

            def receive(kind: str, found: Row, name: str = name) -> None:
                written.add(name, kind, found)

            status = run_section(SECTIONS[name].section, options.device, options.tiny, deadline, kill_at, receive)
        written.end(name, status, time.time() - begun)


if __name__ == "__main__":
    # The default would end this process without ending the one that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
