"""How the callbacks log: scalars to all loggers and to Lightning's metrics, texts and warnings to those that can."""

import math
from collections.abc import Iterator, Mapping

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from tensorboard.compat.proto.summary_pb2 import Summary

from lightning_muon.callbacks.arguments import NameChoice
from lightning_muon.report.plain_text import markdown, printable
from lightning_muon.report.tags import tag_of

# The part of a tag that stands in the place of a name.
SUMMARIES = ("max", "mean", "min")


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning logs the values of the current batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def summarize(quantity: str, values: Mapping[str, float], chosen: NameChoice) -> Iterator[tuple[str, float]]:
    """Yield tags and values: ``quantity/max``, ``/mean``, ``/min`` of values by name, and one for each chosen name.

    If one value is NaN, all three are NaN, so that it is seen. A module called ``max``, ``mean`` or ``min`` gets a dot
    in front of its name.
    """
    if values:
        numbers = [math.nan] if any(map(math.isnan, values.values())) else list(values.values())
        yield f"{quantity}/max", max(numbers)
        yield f"{quantity}/mean", sum(numbers) / len(numbers)
        yield f"{quantity}/min", min(numbers)
        for name, value in values.items():
            if chosen.takes(name):
                yield f"{quantity}/{'.' if name in SUMMARIES else ''}{name}", value


class Listener:
    """A callback that hears what the others log, on every rank."""

    def hear_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take scalars by the names of their quantities."""

    def hear_text(self, step: int, name: str, text: str) -> None:
        """Take a text by its name."""


def log_scalars(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Log scalars to every logger, and make them available to ``ModelCheckpoint`` and ``EarlyStopping``.

    Args:
        trainer: With the loggers.
        scalars: By the names of their quantities. Their tags, and the keys of ``trainer.callback_metrics``, have the
            namespace of ``report.tags``.
    """
    if not scalars:
        return
    tagged = {tag_of(name): value for name, value in scalars.items()}
    write_scalars(trainer, tagged)
    # The property trainer.callback_metrics would first reduce everything else that was logged.
    metrics = dict(zip(tagged, torch.tensor(list(tagged.values())).unbind(), strict=True))
    trainer._logger_connector._callback_metrics.update(metrics)
    for listener in _listeners(trainer):
        listener.hear_scalars(logged_step(trainer), scalars)


def write_scalars(trainer: Trainer, tagged: Mapping[str, float], step: int | None = None) -> None:
    """Write scalars, by their tags, to every logger; by default at the step of the current batch."""
    step = logged_step(trainer) if step is None else step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and type(logger).log_metrics is TensorBoardLogger.log_metrics:
            _write_one_event(logger, tagged, step)
        else:
            logger.log_metrics(dict(tagged), step=step)


def _listeners(trainer: Trainer) -> list[Listener]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Listener)]


@rank_zero_only
def _write_one_event(logger: TensorBoardLogger, scalars: Mapping[str, float], step: int) -> None:
    """Write all scalars as one event: one event each, as TensorBoardLogger writes them, takes ten times as long."""
    values = [
        Summary.Value(tag=f"{logger._prefix}-{name}" if logger._prefix else name, simple_value=value)
        for name, value in scalars.items()
    ]
    logger.experiment._get_file_writer().add_summary(Summary(value=values), step)


def log_text(trainer: Trainer, name: str, text: str) -> None:
    """Write a text in Markdown to TensorBoard, Weights & Biases (a table of one cell) or MLflow (an artifact).

    Args:
        trainer: With the loggers.
        name: Of the text; its tag has the namespace of ``report.tags``.
        text: The Markdown.
    """
    step, tag = logged_step(trainer), tag_of(name)
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=[tag], data=[[text]], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{tag}/step-{step}.md")
    for listener in _listeners(trainer):
        listener.hear_text(step, name, text)


def log_message(trainer: Trainer, tag: str, message: str) -> None:
    """Write a message, with names and values in it that are not Markdown, to TensorBoard as it is."""
    log_text(trainer, tag, markdown(message))


def warn(trainer: Trainer, message: str) -> None:
    """Warn on the console, and in TensorBoard under the text ``warnings``, which collects the warnings of a run."""
    rank_zero_warn(printable(message))
    log_message(trainer, "warnings", message)
