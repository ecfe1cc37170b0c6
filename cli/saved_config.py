"""The file beside the logs that repeats a run."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override


class SaveRunConfig(SaveConfigCallback):
    """Saves the whole configuration of a run to its log directory, and leaves those of earlier runs there alone.

    ``fit`` writes ``config.yaml``, another subcommand writes its own name, such as ``validate.yaml``. A run that goes
    on in the directory of an earlier one writes ``config-1.yaml``, ``config-2.yaml``, …: nothing is overwritten, and
    nothing aborts.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.already_saved:
            subcommand = TrainerFn(stage).value
            stem = "config" if subcommand == "fit" else subcommand
            directory = Path(str(trainer.log_dir))  # which every rank must ask for: it is broadcast
            name = _free_name(directory, stem) if trainer.is_global_zero else ""
            self.config_filename = trainer.strategy.broadcast(name)
        super().setup(trainer, pl_module, stage)


def _free_name(directory: Path, stem: str) -> str:
    name, number = f"{stem}.yaml", 0
    while (directory / name).exists():
        number += 1
        name = f"{stem}-{number}.yaml"
    return name
