"""What watching costs: the demo with its monitors, beside the demo without them, in turns within one run.

``python -m benchmarks.monitors`` generates the demo's project, trains its model under its default configuration, and
switches the monitors on and off every so many steps. It prints by how much steps with them are longer, and how much of
that is spent in which.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cookiecutter.main import cookiecutter
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from benchmarks.record import REPOSITORY, RESULTS, report
from lightning_muon.cli import MuonCLI

# What of a callback is called in each step, by Lightning or by an optimizer.
HOOKS = (
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "_before_step",
    "_after_step",
    "_raise_decay",
    "_lower_decay",
)
WARM_UP_STEPS = 20
COLUMNS = ["monitor", "ms in 10 steps", "% of the steps' time", "95 % interval"]


class Spent:
    """Seconds spent in each monitor, by its name: the outermost call counts."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._owner: str | None = None

    @contextmanager
    def by(self, owner: str) -> Any:
        """Count what is done in this context, unless it is inside another."""
        if self._owner is not None:
            yield
            return
        self._owner, start = owner, time.perf_counter()
        try:
            yield
        finally:
            self._owner = None
            self.seconds[owner] += time.perf_counter() - start

    def timed(self, function: Callable[..., Any], owner: str) -> Callable[..., Any]:
        """Return the function, such that its calls count."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.by(owner):
                return function(*arguments, **options)

        return call

    def watch(self, monitor: Callback) -> None:
        """Count the hooks of a callback."""
        name = type(monitor).__name__
        for hook in HOOKS:
            if hasattr(monitor, hook):
                setattr(monitor, hook, self.timed(getattr(monitor, hook), name))

    def watch_registered(self, owner: Any, method: str) -> None:
        """Count the hooks that monitors register with a module or an optimizer while they run themselves."""
        register = getattr(owner, method)

        def counted(*arguments: Any, **options: Any) -> Any:
            if self._owner is None:
                return register(*arguments, **options)
            *first, hook = arguments
            return register(*first, self.timed(hook, self._owner), **options)

        setattr(owner, method, counted)


class Turns(Callback):
    """Train in turns with the monitors and without them, and keep the time of each turn.

    Args:
        monitors: Whose cost is measured.
        turn: Steps of a turn; all monitors should measure in it as often as they do on average.
    """

    def __init__(self, monitors: list[Callback], turn: int) -> None:
        self.monitors = monitors
        self.turn = turn
        self.spent = Spent()
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._all: list[Callback] = []
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the monitors counted."""
        self._all = list(trainer.callbacks)  # type: ignore[attr-defined]
        for monitor in self.monitors:
            self.spent.watch(monitor)
        self.spent.watch_registered(nn.Module, "register_forward_hook")
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_orthogonalize_hook"):
                self.spent.watch_registered(optimizer, "register_orthogonalize_hook")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Change turns; this comes last of all callbacks."""
        steps = trainer.global_step - WARM_UP_STEPS
        if steps < 0 or steps % self.turn:
            return
        now = time.perf_counter()
        watching = steps // self.turn % 2 == 1  # the turn that ends; the warm-up was with them
        if steps:
            self.seconds[watching].append(now - self._start)
        else:
            self.spent.seconds.clear()
        next_with = not watching if steps else True
        without = [callback for callback in self._all if callback not in self.monitors]
        trainer.callbacks = self._all if next_with else without  # type: ignore[attr-defined]
        self._start = time.perf_counter()


def main(arguments: list[str] | None = None) -> None:
    """Run the demo and record what its monitors cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of turns, with and without monitors")
    parser.add_argument("--turn", type=int, default=100, help="steps of a turn")
    parser.add_argument("--quick", action="store_true", help="few and short turns: to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.turn = 2, 10
    steps = WARM_UP_STEPS + 2 * options.pairs * options.turn
    with tempfile.TemporaryDirectory() as folder:
        turns = train(Path(folder), options.turn, steps)
    report(
        f"What the monitors add to the demo's steps, measuring as it does by default: {options.pairs} pairs of"
        f" {options.turn} steps",
        rows(turns),
        COLUMNS,
        {"pairs": options.pairs, "steps of a turn": options.turn, "quick": options.quick},
        "monitors-cpu",
        options.results,
    )


def rows(turns: Turns) -> list[dict[str, Any]]:
    """Return a row for each monitor by its own time, and one for all by the difference of the turns."""
    with_them, without = turns.seconds[True], turns.seconds[False]
    steps = turns.turn * len(with_them)
    step = sum(without) / steps
    found: list[dict[str, Any]] = []
    for name, seconds in sorted(turns.spent.seconds.items(), key=lambda item: -item[1]):
        found.append(_row(name, seconds / steps, step))
    found.append(_row("sum of these", sum(turns.spent.seconds.values()) / steps, step))
    differences = [(one - other) / turns.turn for one, other in zip(with_them, without, strict=True)]
    low, high = interval(differences)
    paired = _row("all, by paired turns", statistics.mean(differences), step)
    found.append({**paired, "95 % interval": f"{100 * low / step:+.2f} … {100 * high / step:+.2f} %"})
    found.append({"monitor": "the steps without monitors", "ms in 10 steps": 1e4 * step})
    return found


def interval(differences: list[float], resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993)."""
    values, draw = torch.tensor(differences, dtype=torch.float64), torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (resamples, len(values)), generator=draw)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _row(name: str, seconds: float, step: float) -> dict[str, Any]:
    """Return the row of what costs so many seconds a step, where a step without takes ``step`` seconds."""
    return {"monitor": name, "ms in 10 steps": 1e4 * seconds, "% of the steps' time": 100 * seconds / step}


def train(folder: Path, turn: int, steps: int) -> Turns:
    """Generate the demo's project in a folder, and train its model for so many steps."""
    cookiecutter(str(REPOSITORY), no_input=True, default_config=True, output_dir=str(folder))
    project = folder / "my-muon-project"
    sys.path.insert(0, str(project / "src"))
    from my_muon_project.data import TextData  # type: ignore[import-not-found]  # noqa: PLC0415
    from my_muon_project.module import TextModule  # type: ignore[import-not-found]  # noqa: PLC0415

    found: list[Turns] = []

    class Measured(MuonCLI):
        def before_fit(self) -> None:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            monitors = [one for one in callbacks if type(one).__module__.startswith("lightning_muon.callbacks")]
            found.append(Turns(monitors, turn))
            kept = [one for one in callbacks if not isinstance(one, ModelCheckpoint)]
            self.trainer.callbacks = [*kept, found[0]]  # type: ignore[attr-defined]

        def after_fit(self) -> None:
            """Print nothing of the run."""

    logs = f"--trainer.logger.init_args.save_dir={folder / 'logs'}"
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    Measured(
        TextModule,
        TextData,
        default_config=project / "configs" / "default.yaml",
        args=["fit", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", *quiet, logs],
    )
    return found[0]


if __name__ == "__main__":
    main()
