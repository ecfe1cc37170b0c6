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
# Nobody can act on these; the last two are said again, or at the end of the run.
_NOISE = re.compile(
    r"(.*Tip: For seamless|(GPU|TPU|HPU) available: False|Restoring states from the checkpoint path"
    r"|`Trainer.fit` stopped: `max_)"
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
        fitting: Whether the run trains, and saves checkpoints.
        quiet: Whether nothing is shown.
    """
    hush_lightning(fitting=fitting)
    given: list[Callback] = list(config.get("callbacks") or [])
    if quiet:
        config["callbacks"] = [one for one in given if not isinstance(one, ProgressBar | ModelSummary)]
        config["enable_progress_bar"] = config["enable_model_summary"] = False
        return
    own: list[Callback] = [PrintRouting()] if fitting else []
    shows = not config.get("barebones")
    if (
        shows
        and config.get("enable_progress_bar") is not False
        and not any(isinstance(one, ProgressBar) for one in given)
    ):
        own.append(StepProgressBar())
    if (
        shows
        and config.get("enable_model_summary") is not False
        and not any(isinstance(one, ModelSummary) for one in given)
    ):
        own.append(ParameterSummary())
    config["callbacks"] = [*given, *own]


def hush_lightning(*, fitting: bool) -> None:
    """Filter out Lightning's advertisements, and its warnings about its own code and what a user cannot change.

    Args:
        fitting: Whether the run saves checkpoints. Otherwise the warning about their folder is filtered out too.
    """
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # It logs nevertheless: steps are counted over epochs.
    warnings.filterwarnings("ignore", message=r"The number of training batches \(\d+\) is smaller than the logging")
    if not fitting:
        warnings.filterwarnings("ignore", message="The dirpath has changed")
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_worth_reading)


def hush_all_but_warnings() -> None:
    """Show nothing of Lightning's below a warning, its seed included."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not _NOISE.match(str(record.msg))
