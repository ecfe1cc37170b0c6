"""Optimizers, each tuned by the same rules, at two sizes and with a mixture of experts.

``python -m benchmarks.embedded_text.comparison --size 1m`` runs the command ``compare``. Killed, it goes on in
``--folder`` where it was.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.embedded_text.project import QUICK, compare, parser_of, write_record
from lightning_muon.experiments.outcome import Outcome
from lightning_muon.experiments.output import HORIZONS, TUNING, rows


@dataclass(frozen=True)
class Size:
    """A comparison.

    Args:
        words: What is trained.
        optimizers: The first is the baseline.
        tuned: What is tuned.
        seeds: How many.
        arguments: Of ``fit``, over the defaults of the project: 300 steps of 2048 bytes.
    """

    words: str
    optimizers: Sequence[str]
    tuned: Sequence[str]
    seeds: int = 4
    arguments: Sequence[str] = ()


SIZES: Mapping[str, Size] = {
    "1m": Size(
        "a GPT of 0.85 million parameters",
        ("adamw", "moonlight", "soap", "polargrad", "fast", "normuon", "adam", "int8", "fixed_norm", "shampoo"),
        ("lr", "roles", "embedding", "head", "weight_decay"),
    ),
    # The rates of embedding and head keep the ratio of the presets: a tuning of half as many runs.
    "8m": Size(
        "a GPT of 7.5 million parameters",
        ("adamw", "moonlight", "soap", "polargrad", "fast", "normuon"),
        ("lr", "roles", "weight_decay"),
        arguments=("--model.net.dim=320", "--model.net.depth=6", "--model.net.heads=5"),
    ),
    "moe": Size(
        "a mixture of 4 experts",
        ("adamw", "moonlight", "polargrad"),
        ("lr", "roles"),
        arguments=("--model.net.experts=4",),
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a comparison, or go on with it, and write the record."""
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=[*SIZES], default="1m")
    parser.add_argument("--optimizers", metavar="a,b,…", help="others; the first is the baseline")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    optimizers = options.optimizers.split(",") if options.optimizers else size.optimizers
    tuned, seeds, extra = size.tuned, size.seeds, size.arguments
    if options.quick:
        optimizers, tuned, seeds, extra = optimizers[:2], (), 2, QUICK
    folder = options.folder.absolute() / options.size
    command = [f"--optimizers={','.join(optimizers)}", f"--tune={','.join(tuned)}", f"--seeds={seeds}"]
    outcome = compare(folder, [*command, f"--jobs={options.jobs}", *extra])
    outcome["rows"] = rows(Outcome.from_json(json.dumps(outcome)))
    for run in (run for finalist in outcome["finalists"] for run in finalist["runs"]):
        del run["result"]["figures"]  # what the monitors logged stays in the folder of the study
    title = f"{size.words}, {' '.join(extra)}; tuned: {', '.join(tuned)}; {options.jobs} runs at a time"
    record = write_record(options, f"comparison-{options.size}", title, folder, outcome)
    options.images.mkdir(parents=True, exist_ok=True)
    for plot in filter(Path.is_file, (folder / "study" / name for name in (HORIZONS, TUNING))):
        shutil.copyfile(plot, options.images / f"{record.stem}-{plot.name}".replace("_", "-"))


if __name__ == "__main__":
    main()
