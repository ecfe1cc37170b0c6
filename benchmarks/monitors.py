"""The cost of the monitors: the demo with and without them, in turns within one run.

``python -m benchmarks.monitors`` generates the demo's project, trains its model with the default configuration, and
switches the monitors on and off after a fixed number of steps. It prints the time spent in each monitor. It also prints
how much longer a logged step is than the steps before it, with monitors minus without.
"""

import argparse
import tempfile
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.demo import SMALL, generate, inside
from benchmarks.record import RESULTS, report
from benchmarks.turns import COLUMNS, Turns, rows
from lightning_muon.cli import MuonCLI


def main(arguments: list[str] | None = None) -> None:
    """Train the demo and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="pairs of turns, with and without monitors")
    parser.add_argument("--turn", type=int, default=100, help="steps per turn")
    parser.add_argument("--quick", action="store_true", help="short turns of a small model, to check that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.turn = 1, 25
    steps = (1 + 2 * options.pairs) * options.turn
    with tempfile.TemporaryDirectory() as folder:
        turns = train(Path(folder), options.turn, steps, SMALL if options.quick else [])
    report(
        f"What the monitors add to the demo's steps, measuring as it does by default: {options.pairs} pairs of"
        f" {options.turn} steps",
        rows(turns),
        COLUMNS,
        {"pairs": options.pairs, "steps of a turn": options.turn, "quick": options.quick},
        "monitors-cpu",
        options.results,
    )


def train(folder: Path, turn: int, steps: int, options: list[str]) -> Turns:
    """Generate the demo's project in a folder, and train its model in turns."""
    project, module, data = generate(folder)
    found: list[Turns] = []

    class Measured(MuonCLI):
        def before_fit(self) -> None:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            monitors = [one for one in callbacks if type(one).__module__.startswith("lightning_muon.callbacks")]
            found.append(Turns(monitors, turn))
            kept = [one for one in callbacks if not isinstance(one, ModelCheckpoint)]
            self.trainer.callbacks = [*kept, found[0]]  # type: ignore[attr-defined]

        def after_fit(self) -> None:
            """Do not print the closing lines of the run."""

    Measured(
        module,
        data,
        default_config=project / "configs" / "default.yaml",
        args=["fit", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", *inside(project), *options],
    )
    return found[0]


if __name__ == "__main__":
    main()
