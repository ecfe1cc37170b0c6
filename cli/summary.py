"""The end of a fit on the terminal: how good it is, how healthy, where its files are, and what comes next."""

from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_muon import report
from lightning_muon.cli.output import program_name, python, quoted
from lightning_muon.report.picture import PICTURE
from lightning_muon.report.plain_text import printable
from lightning_muon.report.tags import is_ours

_MOST_REMARKS = 3  # the others are in the report


def print_summary(trainer: Trainer, model: LightningModule) -> None:
    """Print the end of a fit; rank 0 only.

    - The metrics at the end, of the validation if there are any, and the best value of those that checkpoints follow.
    - Why it ended early.
    - The verdict on its health, with what to do, from what a ``TensorBoardLogger`` or ``CSVLogger`` wrote.
    - Its folder, its checkpoints, its picture, and commands to look at it and to predict.
    """
    if not trainer.is_global_zero:
        return
    console = Console()
    _print_metrics(console, trainer)
    for line in _lines(trainer, model):  # unbroken in a narrow terminal, so that it can be copied
        console.print(printable(line), soft_wrap=True, markup=False, highlight=False)


def _print_metrics(console: Console, trainer: Trainer) -> None:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    best = {
        callback.monitor: float(callback.best_model_score)
        for callback in _checkpoints(trainer)
        if callback.monitor and callback.best_model_score is not None
    }
    table = Table(title=f"after {trainer.global_step} steps")
    table.add_column("metric")
    table.add_column("value", justify="right")
    if best:
        table.add_column("best", justify="right")
    # How good a run is, not what its monitors measure.
    own = [name for name in metrics if not is_ours(name) and not name.startswith("lr-")]
    for name in sorted(name for name in own if name.startswith("val/")) or sorted(own):
        row = [escape(printable(name)), f"{metrics[name]:.4g}"]
        table.add_row(*row, *([f"{best[name]:.4g}" if name in best else ""] if best else []))
    if table.row_count:
        console.print(table)


def _lines(trainer: Trainer, model: LightningModule) -> Iterator[str]:
    yield from _early_end(trainer)
    folders = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, TensorBoardLogger | CSVLogger)]
    if folders:
        yield from _health(folders[0])
        yield f"folder:     {folders[0]}"
    callbacks = _checkpoints(trainer)
    # The last checkpoint, or else the best one.
    paths = [callback.last_model_path for callback in callbacks] + [callback.best_model_path for callback in callbacks]
    checkpoint = next((path for path in paths if path), "")
    if checkpoint:
        yield f"checkpoint: {checkpoint}"
    for callback in callbacks:
        if callback.monitor and callback.best_model_path and callback.best_model_path != checkpoint:
            yield f"best:       {callback.best_model_path}"
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield f"look:       {python()} -m tensorboard.main --logdir {quoted(str(logger.save_dir))}"
        elif isinstance(logger, MLFlowLogger):
            yield f"look:       {python()} -m mlflow ui --backend-store-uri {quoted(logger._tracking_uri)}"
    if folders:
        yield f"report:     {program_name()} report {quoted(str(folders[0]))}"
        if (picture := folders[0] / PICTURE).is_file():
            yield f"picture:    {picture}"
    if profile := _profile_of(trainer):
        yield f"profile:    {profile}"
    if checkpoint and is_overridden("predict_step", model):
        sharded = " --trainer.strategy fsdp2" if _is_sharded(Path(checkpoint)) else ""
        yield f"predict:    {program_name()} predict --ckpt_path {quoted(checkpoint)}{sharded}"


def _early_end(trainer: Trainer) -> Iterator[str]:
    for early in trainer.early_stopping_callbacks if trainer.should_stop else ():
        if isinstance(early, EarlyStopping) and early.stopping_reason_message:
            value = trainer.callback_metrics.get(early.monitor)
            at = "" if value is None else f" at {early.monitor} {float(value):.4g}"
            reason = early.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
            yield f"stopped early{at}: {reason}"


def _health(folder: Path) -> Iterator[str]:
    """Yield the verdict on what a run logged, and what to do about it."""
    try:
        comparison = report.compare([folder], limit=1)
    except (report.RunLogError, OSError):  # it logged nothing that can be read
        return
    verdict, remarks = comparison.verdict(0), comparison.advice(0)
    if verdict in {"too short to judge", "not measured"} and len(remarks) == 1:
        yield f"health:     {remarks[0]}"
        return
    yield f"health:     {verdict}"
    yield from (f"            {remark}" for remark in remarks[:_MOST_REMARKS])
    if len(remarks) > _MOST_REMARKS:
        yield f"            {len(remarks) - _MOST_REMARKS} more in the report"


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _profile_of(trainer: Trainer) -> Path | None:
    """Return the file that a profiler has written."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if not (profiler.filename and profiler.dirpath):
        return None
    return Path(profiler.dirpath, profiler._prepare_filename())


def _is_sharded(checkpoint: Path) -> bool:
    if not checkpoint.is_dir():
        return False
    from lightning_muon.strategies import is_checkpoint_folder  # noqa: PLC0415 - it takes 0.1 s, which --help does not

    return is_checkpoint_folder(checkpoint)
