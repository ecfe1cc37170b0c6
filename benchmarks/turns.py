"""Training in turns with and without monitors, and what they cost by the length of its steps."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

# The methods of a callback that Lightning calls in a step. The first runs once; in it, monitors register hooks.
HOOKS = ("on_train_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
# The methods by which monitors register hooks on an optimizer.
REGISTER = (
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_orthogonalize_pre_hook",
    "register_orthogonalize_hook",
)
# Number of steps that a logged step is compared with.
NEIGHBOURS = 8
IN_LOGGED_STEPS = "in logged steps, by the steps' length"
COLUMNS = ["monitor", "ms in 10 steps", "% of the steps' time", "95 % interval"]


class Spent:
    """The seconds spent in each monitor, by name. Nested calls count for the outermost one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.in_other_steps = 0.0  # seconds of all monitors in the steps that are not logged
        self.counts = True  # whether time is counted: some hooks run in turns without monitors too
        self.is_logged = False
        self._owner: str | None = None

    @contextmanager
    def by(self, owner: str) -> Any:
        """Add the time of the context to ``owner``, unless it is inside another context."""
        if self._owner is not None:
            yield
            return
        self._owner, start = owner, time.perf_counter()
        try:
            yield
        finally:
            self._owner = None
            seconds = time.perf_counter() - start
            if self.counts:
                self.seconds[owner] += seconds
                self.in_other_steps += 0.0 if self.is_logged else seconds

    def timed(self, function: Callable[..., Any], owner: str) -> Callable[..., Any]:
        """Wrap a function so that its time is added to ``owner``."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.by(owner):
                return function(*arguments, **options)

        return call

    def watch(self, monitor: Callback) -> None:
        """Measure the hooks of a callback."""
        name = type(monitor).__name__
        for hook in HOOKS:
            if hasattr(monitor, hook):
                setattr(monitor, hook, self.timed(getattr(monitor, hook), name))

    def watch_registered(self, owner: Any, method: str) -> None:
        """Measure the hooks that monitors register on a module or an optimizer."""
        register = getattr(owner, method)

        def counted(*arguments: Any, **options: Any) -> Any:
            if self._owner is None:
                return register(*arguments, **options)
            *first, hook = arguments
            return register(*first, self.timed(hook, self._owner), **options)

        setattr(owner, method, counted)


class Turns(Callback):
    """Train in turns with and without the monitors, and record the time of each step.

    Args:
        monitors: The monitors to measure.
        turn: Steps per turn. Each monitor should measure as often in a turn as on average.
    """

    def __init__(self, monitors: list[Callback], turn: int) -> None:
        self.monitors = monitors
        self.turn = turn
        self.spent = Spent()
        self.steps: list[Step] = []
        self._all: list[Callback] = []
        self._watching = True
        self._end = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the monitors and the hooks that they register."""
        self._all = list(trainer.callbacks)  # type: ignore[attr-defined]
        for monitor in self.monitors:
            self.spent.watch(monitor)
        self.spent.watch_registered(nn.Module, "register_forward_hook")
        for optimizer in trainer.optimizers:
            for method in REGISTER:
                if hasattr(optimizer, method):
                    self.spent.watch_registered(optimizer, method)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the time of the step, and begin the next turn if due. This callback runs last."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        steps = trainer.global_step - self.turn  # the first turn warms up
        if steps > 0:
            self.steps.append(Step(self._watching, is_logged, now - self._end))
        elif steps == 0:
            self.spent.seconds.clear()
            self.spent.in_other_steps = 0.0
        if steps >= 0 and steps % self.turn == 0:
            # The order is with, without, without, with, so that a linear drift of the machine cancels.
            self._watching = steps // self.turn % 4 in {0, 3}
            without = [callback for callback in self._all if callback not in self.monitors]
            trainer.callbacks = self._all if self._watching else without  # type: ignore[attr-defined]
        self.spent.counts = self._watching
        self.spent.is_logged = (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        self._end = time.perf_counter()

    def longer_by(self, watching: bool) -> list[float]:
        """Return how many seconds longer each logged step was than the median of the steps before it.

        The step directly before is not used, because ``OptimizerTimeMonitor`` measures in it.

        Args:
            watching: Use the turns with monitors, or those without.
        """
        return [
            step.seconds
            - statistics.median(before.seconds for before in self.steps[place - NEIGHBOURS - 1 : place - 1])
            for place, step in enumerate(self.steps)
            if step.is_logged and step.watching == watching
        ]


class Step(NamedTuple):
    """One step.

    Args:
        watching: Whether the monitors were on.
        is_logged: Whether it is a logged step, in which monitors measure.
        seconds: Time since the end of the step before.
    """

    watching: bool
    is_logged: bool
    seconds: float


def rows(turns: Turns) -> list[dict[str, Any]]:
    """Return one row per monitor from its own time, and what all cost in logged steps and in the others.

    In logged steps it is the difference between the turns, because monitors also slow down what comes after them. In
    the others it is their own time, which is too much by what the step then finds in the cache.
    """
    steps = sum(step.watching for step in turns.steps)
    step = statistics.median(step.seconds for step in turns.steps if not step.is_logged)
    found: list[dict[str, Any]] = []
    for name, seconds in sorted(turns.spent.seconds.items(), key=lambda item: -item[1]):
        found.append(_row(name, seconds / steps, step))
    found.append(_row("sum of these", sum(turns.spent.seconds.values()) / steps, step))
    with_them, without = turns.longer_by(True), turns.longer_by(False)
    a_step = len(with_them) / steps
    low, high = (100 * a_step * bound / step for bound in interval(with_them, without))
    longer, others = a_step * (trimmed_mean(with_them) - trimmed_mean(without)), turns.spent.in_other_steps / steps
    found.append({**_row(IN_LOGGED_STEPS, longer, step), "95 % interval": f"{low:.2f} … {high:.2f}"})
    found.append(_row("in the other steps, by their own time", others, step))
    found.append(_row("both together", longer + others, step))
    found.append({"monitor": "the steps themselves", "ms in 10 steps": 1e4 * step, "% of the steps' time": 100.0})
    return found


def trimmed_mean(values: Sequence[float] | Tensor) -> float:
    """Return the mean without the lowest and highest tenth, which other load on the machine distorts."""
    ordered = torch.as_tensor(values, dtype=torch.float64).sort().values
    cut = len(ordered) // 10
    return float(ordered[cut : len(ordered) - cut].mean())


def interval(ones: Sequence[float], others: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a difference of trimmed means.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    draw = torch.Generator().manual_seed(0)

    def resampled(values: Sequence[float]) -> Tensor:
        numbers = torch.tensor(values, dtype=torch.float64)
        drawn = numbers[torch.randint(len(numbers), (resamples, len(numbers)), generator=draw)].sort(1).values
        cut = len(numbers) // 10
        return drawn[:, cut : len(numbers) - cut].mean(1)

    low, high = (resampled(ones) - resampled(others)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def _row(name: str, seconds: float, step: float) -> dict[str, Any]:
    """Return a row. ``seconds`` is the cost per step, ``step`` the time of a step without monitors."""
    return {"monitor": name, "ms in 10 steps": 1e4 * seconds, "% of the steps' time": 100 * seconds / step}
