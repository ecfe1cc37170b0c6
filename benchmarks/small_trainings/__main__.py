"""Small trainings of many kinds, with AdamW for all parameters and with ``MuonAdamW`` on routed groups.

``python -m benchmarks.small_trainings`` trains a detector, a diffusion model, a graph network, a GAN and a transformer
for tables on synthetic data, and fine-tunes a language model. For both optimizers, learning rates are swept by factors
of two until the best is not at an end, always over the full schedule; then three other seeds are trained at the best.
The GAN and the transformer for tables are noisy: their sweeps take the mean of two seeds.
All losses are of held-out data. It takes about twenty minutes on one core.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, report
from benchmarks.small_trainings import fine_tuning, structures, training, vision
from benchmarks.small_trainings.training import Result, Task
from lightning_muon.optim import find_routes

TASKS = {
    "detection": vision.detection,
    "diffusion": vision.diffusion,
    "graph": structures.graph,
    "GAN": structures.gan,
    "tabular": structures.tabular,
}
FINE_TUNING = "fine_tuning"
QUICK_STEPS = 4


def main(arguments: list[str] | None = None) -> None:
    """Train all tasks and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps at one learning rate, to check that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*TASKS, FINE_TUNING],
        default=[*TASKS, FINE_TUNING],
        help="the others stay as they are",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = {
        "quick": options.quick,
        "seeds": training.SEEDS,
        "seeds of the sweep": training.SWEEP_SEEDS,
        "weight decay": training.WEIGHT_DECAY,
        "warm-up": training.WARMUP,
    }
    made = {name: make(QUICK_STEPS) if options.quick else make() for name, make in TASKS.items()}
    if chosen := [task for name, task in made.items() if name in options.only]:
        columns = [
            "task",
            "parameters",
            "in Muon, %",
            "AdamW lr",
            "AdamW",
            "MuonAdamW lr",
            "MuonAdamW",
            "gain",
            "verdict",
        ]
        rows = _earlier_rows(options.results / "small_trainings-cpu.json")
        for task in chosen:
            rows[task.name] = _row(task, training.compared(task, quick=options.quick))
        ordered = [rows[task.name] for task in made.values() if task.name in rows]
        report("Small trainings: held-out loss", ordered, columns, settings, "small_trainings-cpu", options.results)
    if FINE_TUNING in options.only:
        columns = ["fine-tuned", "pretrained by", "lr", "before", "after", "against AdamW", "verdict", "forgotten"]
        tuned = _fine_tuning_rows(list(fine_tuning.fine_tuned(options.quick)))
        title = "Fine-tuning: held-out loss on English"
        report(title, tuned, columns, settings, "small_trainings-fine_tuning", options.results)


def _earlier_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a record by their task; none if there is no record."""
    return {row["task"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def _row(task: Task, results: list[Result]) -> dict[str, Any]:
    reference, other = results
    routes = find_routes(task.model(), task.rules)
    elements = {r.name: r.parameter.numel() for r in routes}
    in_muon = sum(elements[r.name] for r in routes if r.algorithm == "muon")
    row: dict[str, Any] = {
        "task": task.name,
        "parameters": sum(elements.values()),
        "in Muon, %": round(100 * in_muon / sum(elements.values())),
        "gain": _with_interval(*training.gain(reference, other)),
        "verdict": training.verdict(reference, other),
    }
    for result in results:
        row |= {f"{result.optimizer} lr": result.best, result.optimizer: f"{result.mean:.4g}"}
        row |= {f"{result.optimizer} losses": result.losses, f"{result.optimizer} sweep": _sweep(result)}
    return row


def _fine_tuning_rows(tuned: list[fine_tuning.Tuned]) -> list[dict[str, Any]]:
    """The rows of all ways, each compared with AdamW on the same model, of all weights or of LoRA."""
    rows = []
    for one in tuned:
        kind = one.way.partition(",")[0]
        (reference,) = (
            other.result
            for other in tuned
            if other.way == f"{kind}, AdamW" and other.pretrained_by == one.pretrained_by
        )
        same = reference is one.result
        rows.append(
            {
                "fine-tuned": one.way,
                "pretrained by": one.pretrained_by,
                "lr": one.result.best,
                "before": f"{one.before:.3f}",
                "after": f"{one.result.mean:.4f}",
                "against AdamW": None if same else _with_interval(*training.gain(reference, one.result)),
                "verdict": None if same else training.verdict(reference, one.result),
                "forgotten": f"{one.forgotten:+.3f}",
                "losses": one.result.losses,
                "sweep": _sweep(one.result),
            }
        )
    return rows


def _with_interval(difference: float, half: float) -> str:
    return f"{difference:+.2g} ± {half:.2g}"


def _sweep(result: Result) -> dict[str, float | None]:
    """Losses by learning rate; ``None`` where it diverged, which JSON can say."""
    return {f"{lr:g}": loss if math.isfinite(loss) else None for lr, loss in result.sweep.items()}


if __name__ == "__main__":
    main()
