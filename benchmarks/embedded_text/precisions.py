"""What bfloat16 loses: AdamW and Muon in float32, with bfloat16 products, and with weights that are bfloat16.

``python -m benchmarks.embedded_text.precisions`` trains each with the same seeds by the command ``sweep``, and reads
loss and monitors from what the runs logged.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.embedded_text.project import QUICK, by_seed, compared, parser_of, sweep, write_config, write_record
from benchmarks.record import print_table
from lightning_muon.experiments.runs import RUNS
from lightning_muon.report import read_run

OPTIMIZERS = ("adamw", "moonlight", "int8", "polargrad")
# What `comparison` found for AdamW, whose preset is farther from it than Muon's; the others train with their presets.
TUNED = {
    "adamw": "model: {lr_by_role: {embedding: 0.972, head: 0.012, vector: 0.012},"
    " optimizer: {lr: 0.004, weight_decay: 0.0333}}"
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")  # the first is the reference
SEEDS = (42, 43, 44, 45)
# Columns and the names of quantities: of the values that a run logs, the median. The first two are only logged where
# weights have 16 bits.
MONITORS = {
    "bf16 headroom": "bf16_headroom/mean",
    "lost updates": "lost_updates/mean",
    "weight RMS, largest": "weight_rms/max",
    "output RMS, largest": "output_rms/max",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, or go on with it, and write the record."""
    options = parser_of(__doc__).parse_args(arguments)
    optimizers, seeds = (OPTIMIZERS[:2], SEEDS[:2]) if options.quick else (OPTIMIZERS, SEEDS)
    folder = options.folder.absolute() / "precisions"
    tuned = {name: [write_config(folder, f"tuned_{name}", text)] for name, text in TUNED.items()}
    configs = {name: [f"optimizer/{name}", *tuned.get(name, ())] for name in optimizers}
    varied = {"config": [*configs.values()], "trainer.precision": PRECISIONS, "seed_everything": seeds}
    trials = sweep(folder, varied, [f"--jobs={options.jobs}", *(QUICK if options.quick else ())])
    runs = folder / "study" / RUNS
    rows = [
        {"optimizer": name, **_row(files, precision, trials, runs)}
        for name, files in configs.items()
        for precision in PRECISIONS
    ]
    title = f"Precisions, {len(seeds)} seeds; losses with 95 % intervals, medians of what the monitors logged"
    print_table(title, rows, list(rows[0]))
    write_record(options, "precisions", title, folder, {"seeds": seeds, "rows": rows})


def _row(files: list[str], precision: str, trials: Sequence[Mapping[str, Any]], runs: Path) -> dict[str, Any]:
    own, reference = (
        by_seed(trials, {"config": files, "trainer.precision": one}) for one in (precision, PRECISIONS[0])
    )
    logs = [read_run(runs / trial["name"], trial["name"]) for trial in own.values()]
    return {
        "precision": precision,
        **compared(own, reference, "in float32"),
        **{name: _median(value for log in logs for value in log.values(tag)) for name, tag in MONITORS.items()},
        "MB of state": _median(trial["figures"].get("optimizer_state/bytes", 0) / 1e6 for trial in own.values()),
        "verdicts": ", ".join(sorted({trial["verdict"] for trial in own.values()})),
    }


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


if __name__ == "__main__":
    main()
