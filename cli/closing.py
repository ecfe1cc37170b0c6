"""What a run says when it is over: how good it is, where it lies, what to do next."""

from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.table import Table

from lightning_muon.cli.program_name import python, quoted
from lightning_muon.strategies import is_checkpoint_folder


@rank_zero_only
def print_closing(trainer: Trainer, model: LightningModule, program: str) -> None:
    """Prints the final metrics, the checkpoint, and the commands that look at the run and predict from it."""
    console = Console()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    table = Table(title=f"after {trainer.global_step} steps")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in sorted(name for name in metrics if name.startswith("val/")) or sorted(metrics):
        table.add_row(name, f"{metrics[name]:.4g}")
    if table.row_count:
        console.print(table)
    # Commands and paths are to be copied: one line each, however narrow the terminal.
    checkpoint = _checkpoint(trainer)
    if checkpoint:
        console.print(f"checkpoint: {checkpoint}", soft_wrap=True, markup=False, highlight=False)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            look = f"{python()} -m tensorboard.main --logdir {quoted(str(logger.save_dir))}"
            console.print(f"look:       {look}", soft_wrap=True, markup=False, highlight=False)
    if checkpoint and is_overridden("predict_step", model):
        sharded = " --trainer.strategy fsdp2" if is_checkpoint_folder(Path(checkpoint)) else ""
        console.print(f"predict:    {program} predict --ckpt_path {quoted(checkpoint)}{sharded}", soft_wrap=True)


def _checkpoint(trainer: Trainer) -> str:
    """The last checkpoint, or else the best, or nothing where none was saved."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    paths = [callback.last_model_path for callback in callbacks] + [callback.best_model_path for callback in callbacks]
    return next((path for path in paths if path), "")
