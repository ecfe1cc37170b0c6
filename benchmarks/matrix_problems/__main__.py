"""Run every method on every problem with each of its learning rates: ``python -m benchmarks.matrix_problems``."""

import argparse
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.matrix_problems.methods import METHODS
from benchmarks.matrix_problems.plots import plot
from benchmarks.matrix_problems.problems import PROBLEMS
from benchmarks.matrix_problems.training import Curve, Run, train
from benchmarks.record import REPOSITORY, RESULTS, report

POINTS = 60  # of a curve
QUICK_STEPS = 5


class Row(NamedTuple):
    """A method on a problem: the run with the best learning rate, and the final loss of all."""

    best: Run
    curve: Curve
    sweep: dict[float, float | None]  # the final loss for each lr; None if it diverged


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run, print the tables and write the record and the plots."""
    options = _parse(arguments)
    runs = list(_runs(options))
    rows = _best(runs, _train_all(runs, options.workers))

    shown = [_shown(row) for row in rows]
    for name in options.problems:
        report(
            f"{PROBLEMS[name].title}: {PROBLEMS[name].loss_label}",
            [row for row in shown if row["problem"] == name],
            ["method", "lr decay", "momentum", "best lr", "steps", "loss", "condition", "nuclear norm", "sweep"],
            {"seed": options.seed, "quick": options.quick, "gradient": "condition and nuclear norm at the end"},
            name=f"matrix_problems-{name}",
            results=options.results,
        )
        curves = {_name(row.best): row.curve for row in rows if row.best.problem == name}
        print(
            plot(
                PROBLEMS[name].title, PROBLEMS[name].loss_label, curves, options.images / f"matrix_problems-{name}.png"
            )
        )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix_problems", description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--steps", type=int, help="instead of the paper's 4000, 1500 and 1000")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_STEPS} steps with one learning rate each")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--results", type=Path, help="folder for the JSON record")
    parser.add_argument("--images", type=Path, help="folder for the plots")
    options = parser.parse_args(arguments)
    # --quick gives no valid results, so it must not replace the records.
    scratch = options.results or REPOSITORY / "build" / "benchmarks"
    options.results = scratch if options.quick else options.results or RESULTS
    options.images = options.images or (scratch if options.quick else REPOSITORY / "docs" / "images")
    return options


def _runs(options: argparse.Namespace) -> Iterable[Run]:
    for problem in options.problems:
        steps = options.steps or (QUICK_STEPS if options.quick else PROBLEMS[problem].steps)
        every = steps if options.quick else max(1, steps // POINTS)
        for name, method in METHODS.items():
            rates = method.learning_rates.get(problem, [])
            for decay in method.decays:
                for lr in rates[:1] if options.quick else rates:
                    yield Run(problem, name, decay, lr, steps, every, options.seed)


def _train_all(runs: list[Run], workers: int) -> Iterable[Curve]:
    if workers == 1:
        yield from map(train, runs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(train, runs)


def _best(runs: list[Run], curves: Iterable[Curve]) -> list[Row]:
    """Choose the best learning rate for each method."""
    found: dict[tuple[str, str, bool], list[tuple[Run, Curve]]] = {}
    for number, (run, curve) in enumerate(zip(runs, curves, strict=True), start=1):
        found.setdefault((run.problem, run.method, run.decay), []).append((run, curve))
        ending = "diverged" if curve.diverged else f"{curve.loss[-1]:.3g} after {curve.step[-1]} steps"
        print(f"[{number}/{len(runs)}] {run.problem}: {_name(run)}, lr {run.lr:g}: {ending}", flush=True)
    rows = []
    for tried in found.values():
        run, curve = min(tried, key=lambda pair: _rank(*pair))
        rows.append(Row(run, curve, {r.lr: None if c.diverged else c.loss[-1] for r, c in tried}))
    return rows


def _rank(run: Run, curve: Curve) -> tuple[bool, float, int]:
    """Return the sort key of a run: its final loss, or its number of steps if it converged early."""
    steps = curve.step[-1]
    return curve.diverged, curve.loss[-1] if steps == run.steps else 0.0, steps


def _shown(row: Row) -> dict[str, Any]:
    run, curve = row.best, row.curve
    return {
        "problem": run.problem,
        "method": run.method,
        "lr decay": "yes" if run.decay else "no",
        "momentum": METHODS[run.method].momentum[run.problem],
        "best lr": run.lr,
        "steps": curve.step[-1],
        "loss": curve.loss[-1],
        "condition": curve.condition[-1],
        "nuclear norm": curve.nuclear_norm[-1],
        "sweep": ", ".join(f"{lr:g}: {'–' if loss is None else f'{loss:.2g}'}" for lr, loss in row.sweep.items()),
        "curve": curve._asdict(),
    }


def _name(run: Run) -> str:
    return f"{run.method}, lr decay" if run.decay else run.method


if __name__ == "__main__":
    main()
