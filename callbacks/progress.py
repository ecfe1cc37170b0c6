"""The progress of a fit on the terminal: a bar, or plain lines where there is no terminal."""

import math
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn
from lightning.pytorch.utilities.data import _extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich import get_console
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text
from tqdm import tqdm  # type: ignore[import-untyped]
from typing_extensions import override

from lightning_muon.callbacks.hyperparameter_schedule import steps_of_run
from lightning_muon.callbacks.speed import samples_and_tokens
from lightning_muon.report.plain_text import printable

_EVERY_SECONDS = 0.5  # between two texts on the bar
_RATE_SECONDS = 5.0  # the least that the speed between two logged steps is a mean of
_TEXT_WIDTH = 90  # characters beside the bar: step, loss, speed, time left, and the loss of the validation


class StepProgressBar(RichProgressBar):
    """Show how far a fit is: steps, the metrics with ``prog_bar=True``, tokens or samples a second, and time left.

    - On a terminal and in a notebook it is a bar, one line wide.
    - Without a terminal, as in a pipe or in the file of a SLURM job, it prints a plain line at the first step of this
      process, at each logged step (``log_every_n_steps``), and at the last. Each line is flushed.

    A step is one of the optimizer, counted from the beginning of the run: a resumed run goes on at its step, also in
    the middle of an epoch. A run that ends after some epochs shows these as well. The time left is that of the steps
    left at the mean time of a step of this process, validation included and the first step, which compiles, left out;
    and no more than a ``Timer`` leaves, which is what ``max_time`` makes. Only rank 0 shows anything.

    Metrics are read at the steps above, so no GPU has to wait at others. On a CPU the bar reads them twice a second.

    Args:
        refresh_rate: How often the bar is drawn, per second; 0 shows nothing.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import StepProgressBar
        >>> trainer = Trainer(callbacks=[StepProgressBar()])
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._draws = True
        self._total: int | None = None
        self._steps = self._batches = 0  # so far, in the run and in this process
        self._first: tuple[float, int, int] | None = None  # time, steps and batches after the first step
        self._metrics: dict[str, Any] = {}
        self._rate = ""
        self._since: float | None = None  # the samples below are from this time on
        self._samples = 0
        self._paused_at: float | None = None
        self._shown_at = -math.inf
        self._shown_step = -1

    @property
    @override
    def is_enabled(self) -> bool:
        """Whether bars are drawn."""
        return self._draws and self._shows

    @property
    def _shows(self) -> bool:
        return self._enabled and self.refresh_rate > 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._draws = _can_draw()

    @override
    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self._console is not None and self.is_enabled:
            # It would stay hidden after a process that is killed.
            self._console.show_cursor(True)
            _redirect(self._console)

    @override
    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        theme = self.theme
        return [
            TextColumn("{task.description}"),
            CustomBarColumn(
                table_column=Column(no_wrap=True),  # where it is narrow, the text behind it gets shorter
                bar_width=min(40, max(10, get_console().width - _TEXT_WIDTH)),
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            _Figures(),
        ]

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics with ``prog_bar=True``, as numbers."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self.is_enabled and self.progress is not None and not self._progress_stopped:
            self.progress.console.print(*args, **kwargs)
        elif self._shows:
            print(*args, **kwargs, flush=True)

    # ---- training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._total = _known_steps(trainer)
        self._steps, self._batches, self._samples = trainer.global_step, 0, 0
        self._first = self._since = self._paused_at = None
        self._metrics, self._rate = {}, ""
        self._shown_at, self._shown_step = -math.inf, -1
        if self.is_enabled and self.progress is not None:
            self.train_progress_bar_id = self.progress.add_task(
                self._position(trainer), total=self._total or math.inf, completed=self._steps, figures=""
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the bar is that of the run, not of an epoch."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._paused_at is not None and self._since is not None:
            self._since += time.monotonic() - self._paused_at
        self._paused_at = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._shows:
            return
        self._samples += next(_extract_batch_size(batch), None) or 0
        self._batches += 1
        before, self._steps = self._steps, trainer.global_step
        has_stepped = self._steps != before
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_logged = has_stepped and every > 0 and self._steps // every > before // every
        is_due = has_stepped and (is_logged or self._first is None or self._steps == self._total)
        is_free = trainer.strategy.root_device.type == "cpu" and self.is_enabled  # no device has to wait
        now = time.monotonic()
        if is_due or (is_free and now - self._shown_at >= _EVERY_SECONDS):
            self._read(trainer, pl_module, outputs, is_due=is_due)
        if self._draws:
            if is_due or now - self._shown_at >= _EVERY_SECONDS:
                self._draw(trainer)
        elif is_due:
            self._print_line(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the bar is that of the run, not of an epoch."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._shows and self._first is not None:
            if self._draws:
                self._draw(trainer)
                self.refresh(hard=True)
            elif self._steps != self._shown_step:
                self._print_line(trainer)

    # ---- validation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._paused_at is None:
            self._paused_at = time.monotonic()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._shows and self._first is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._metrics = self.get_metrics(trainer, pl_module) or self._metrics
            if self._draws:
                self._draw(trainer)

    @override
    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: they are part of the text of the bar."""

    # ---- what is shown

    def _read(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *, is_due: bool) -> None:
        """Read the metrics, for which a device has to finish its step, and then the clock."""
        self._metrics = self.get_metrics(trainer, pl_module) or _loss_of(trainer, outputs)
        now = time.monotonic()
        if self._first is None:
            self._first = now, self._steps, self._batches
        elif self._since is not None and self._samples:
            seconds = now - self._since
            # Of a few steps it would jump.
            if is_due or not self._rate or seconds >= _RATE_SECONDS:
                rates = samples_and_tokens(trainer, pl_module, self._samples, max(seconds, 1e-9))
                name, rate = list(rates.items())[-1]
                self._rate = f"{tqdm.format_sizeof(rate)} {name.partition('_')[0]}/s"
        if is_due:
            self._since, self._samples = now, 0

    def _draw(self, trainer: Trainer) -> None:
        self._shown_at = time.monotonic()
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(
                self.train_progress_bar_id,
                completed=self._steps,
                description=self._position(trainer),
                figures="  ".join(self._figures(trainer)),
            )
            self.refresh()

    def _print_line(self, trainer: Trainer) -> None:
        self._shown_step = self._steps
        print(printable("  ".join([self._position(trainer), *self._figures(trainer)])), flush=True)

    def _position(self, trainer: Trainer) -> str:
        total = "" if self._total is None else f"/{self._total}"
        position = f"step {self._steps:>{max(0, len(total) - 1)}}{total}"
        epochs = trainer.max_epochs
        if epochs in (None, -1) or trainer.max_steps != -1:
            return position
        return f"epoch {min(trainer.current_epoch + 1, epochs)}/{epochs}  {position}"

    def _figures(self, trainer: Trainer) -> list[str]:
        # What the user logs for this place comes between the two that a narrow terminal should still show.
        first, *others = [f"{name} {_written(value)}" for name, value in self._metrics.items()] or [""]
        left = self._time_left(trainer)
        time_left = "" if left is None or self._steps == self._total else f"{tqdm.format_interval(left)} left"
        return [text for text in (first, self._rate, time_left, *others) if text]

    def _time_left(self, trainer: Trainer) -> float | None:
        """Return the seconds until the end of the run; ``None`` if they are not known."""
        times = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and (seconds := callback.time_remaining()) is not None:
                times.append(max(0.0, seconds))
        if self._first is not None:
            start, steps, batches = self._first
            seconds = time.monotonic() - start
            if self._total is not None and self._steps > steps:
                times.append((self._total - self._steps) * seconds / (self._steps - steps))
            elif self._total is None and self._batches > batches:
                times.append(_batches_left(trainer) * seconds / (self._batches - batches))
        left = min(times, default=math.inf)
        return left if math.isfinite(left) else None


class _Figures(ProgressColumn):
    """The text of the bar of training; the batches and the time of other bars."""

    @override
    def render(self, task: Task) -> Text:
        if (text := task.fields.get("figures")) is not None:
            return Text(text, no_wrap=True, overflow="ellipsis")
        total = "" if task.total in (None, math.inf) else f"/{task.total:.0f}"
        elapsed = "" if task.elapsed is None else f"  {timedelta(seconds=int(task.elapsed))}"
        return Text(f"{task.completed:.0f}{total}{elapsed}")


class _Unbroken:
    """A console that leaves it to the terminal to break a long line, such as a command to copy."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> "_Unbroken":
        self._console.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._console.__exit__(*exception)

    def print(self, text: Any) -> None:
        self._console.print(text, soft_wrap=True)


def _redirect(console: Console) -> None:
    """Write what others print above the bar, line by line as it is; leave a file that stderr goes to alone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            file = stream.rich_proxied_file
            is_shared = name == "stdout" or file.isatty()
            setattr(sys, name, FileProxy(_Unbroken(console), file) if is_shared else file)  # type: ignore[arg-type]


def _can_draw() -> bool:
    """Return whether a bar can be drawn: a pipe and a file keep each of its states."""
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}
    return is_terminal or get_console().is_jupyter


def _known_steps(trainer: Trainer) -> int | None:
    """Return the steps of the run, if they are known."""
    try:
        return steps_of_run(trainer)
    except MisconfigurationException:  # accumulation that changes between epochs
        return None if trainer.max_steps == -1 else trainer.max_steps


def _batches_left(trainer: Trainer) -> float:
    """Return the training batches until the end of the last epoch; infinity if there is no last one."""
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs in (None, -1):
        return math.inf
    return max(0.0, batches * (epochs - trainer.current_epoch) - trainer.fit_loop.epoch_loop.batch_idx - 1)


def _loss_of(trainer: Trainer, outputs: Any) -> dict[str, float]:
    """Return the loss that a training step returned; it is divided by the batches of a step."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        return {}
    return {"loss": loss.item() * trainer.accumulate_grad_batches}


def _written(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"
