"""What a run shows on the terminal while it goes on: its progress, the model, and which of Lightning's messages."""

import logging
import re
import warnings
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from lightning_muon.callbacks import ParameterSummary, StepProgressBar
from lightning_muon.cli.routing_table import PrintRouting

_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
# Nobody can act on these, or they are said again: when the checkpoint is restored, and at the end of the run.
_NOISE = re.compile(
    r".*Tip: For seamless|(GPU|TPU|HPU) available: False|Trainer already configured with model summary"
    r"|Loading `train_dataloader` to estimate|Restoring states from the checkpoint path"
    r"|\[rank: [1-9]\d*\] Seed set|`Trainer.fit` stopped: `max_"
)


def add_terminal_options(parser: LightningArgumentParser) -> None:
    """Add ``--quiet`` to the parser of a subcommand."""
    parser.add_argument(
        "--quiet", action="store_true", help="Show warnings, errors and the end of the run, and nothing before it."
    )


def settle_terminal(config: dict[str, Any], *, fitting: bool, quiet: bool) -> None:
    """Choose what the trainer shows where the user has not: what updates what, the model, and the progress.

    Args:
        config: The arguments of the trainer, which it changes.
        fitting: Whether the run trains.
        quiet: Whether nothing is shown.
    """
    hush_lightning()
    given: list[Callback] = list(config.get("callbacks") or [])
    if quiet:
        config["callbacks"] = [one for one in given if not isinstance(one, ProgressBar | ModelSummary)]
        config["enable_progress_bar"] = config["enable_model_summary"] = False
        return
    own: list[Callback] = [PrintRouting()] if fitting else []
    for option, kind, callback in (
        ("enable_progress_bar", ProgressBar, StepProgressBar()),
        ("enable_model_summary", ModelSummary, ParameterSummary()),
    ):
        is_free = not (config.get("barebones") or any(isinstance(one, kind) for one in given))
        own += [callback] if is_free and config.get(option) is not False else []
    config["callbacks"] = [*given, *own]


def hush_lightning() -> None:
    """Filter out Lightning's advertisements, and its warnings about its own code and what a user cannot change."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    # It logs nevertheless: steps are counted over epochs.
    warnings.filterwarnings("ignore", message=r"The number of training batches \(\d+\) is smaller than the logging")
    # A run that goes on has a folder of its own.
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_worth_reading)


def hush_all_but_warnings(quiet: bool) -> None:
    """Show of Lightning's messages only warnings and errors, from the seed on, if the run is to be quiet."""
    for name in ("lightning.pytorch", "lightning.fabric") if quiet else ():
        logging.getLogger(name).setLevel(logging.WARNING)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not _NOISE.match(str(record.msg))
