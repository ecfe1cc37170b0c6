"""What the program writes beside its logs: one-line messages and errors, the summary of a run, commands to copy.

Lightning is imported only by the functions that need it, so that light commands start fast.
"""

import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_muon.report.plain_text import printable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# The commands beside those of MuonCLI, each with its line in --help.
OTHER_COMMANDS = {
    "routes": "Show which algorithm updates each parameter of a model, and why, without training it.",
    "sweep": "Train under many settings, of any keys of the configuration, and show which is best.",
    "compare": "Compare optimizers on the same training, after the same tuning of each.",
    "report": "Show the health of one run; of several what differs, and which is best.",
    "export": "Write the weights of a checkpoint for use elsewhere: safetensors, a state dict, or Hugging Face.",
    "consolidate": "Make one file of a sharded checkpoint, which is a folder.",
}


def say(line: str) -> None:
    """Write one line to stderr, on rank 0 only."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # noqa: PLC0415

    rank_zero_only(sys.stderr.write)(f"{printable(line)}\n")


def exit_with(line: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr and an exit code; 2 is the shell's code for a wrong command line."""
    sys.stderr.write(f"error: {printable(' '.join(line.split()))}\n")
    raise SystemExit(code)


def debugging() -> bool:
    """Return whether the user wants tracebacks: ``LIGHTNING_MUON_DEBUG=1`` in the environment."""
    return os.environ.get("LIGHTNING_MUON_DEBUG", "0") not in {"", "0"}


def program_name() -> str:
    """Return the command that started this program, such as ``python -m my_project`` or ``python train.py``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        return f"{python()} -m {spec.name.removesuffix('.__main__')}"
    script = sys.argv[0] if sys.argv else ""
    return f"{python()} {script}" if script.endswith(".py") else Path(script).name


def python() -> str:
    """Return the command for this Python: ``python`` if the shell finds this one by that name, else its path."""
    found = shutil.which("python")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "python"
    path = Path(os.path.relpath(sys.executable))
    return quoted(str(path if len(path.parts) < len(Path(sys.executable).parts) else Path(sys.executable)))


def quoted(path: str) -> str:
    """Return the path in quotes if a shell needs them."""
    return f"'{path}'" if " " in path else path


def resume_command(args: Sequence[str], checkpoint: str) -> str:
    """Return the command that goes on from a checkpoint, with everything else as it was.

    Args:
        args: The command line of the run, without the program.
        checkpoint: The checkpoint to go on from, in place of the one that the run itself may have begun with.
    """
    if {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys():
        # What was before the program's name is not known here.
        return f"the same command, with --ckpt_path {shlex.quote(checkpoint)}"
    kept: list[str] = []
    given = iter(args)
    for arg in given:
        if arg == "--ckpt_path":
            next(given, None)
        elif not arg.startswith("--ckpt_path="):
            kept.append(arg)
    return f"{program_name()} {shlex.join([*kept, '--ckpt_path', checkpoint])}"


def print_summary(trainer: "Trainer", model: "LightningModule") -> None:
    """Print the final metrics, why the run ended early, its files, and commands to show it and predict; rank 0 only."""
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: PLC0415
    from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger  # noqa: PLC0415
    from lightning.pytorch.utilities.model_helpers import is_overridden  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    if not trainer.is_global_zero:
        return
    console = Console()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    table = Table(title=f"after {trainer.global_step} steps")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in sorted(name for name in metrics if name.startswith("val/")) or sorted(metrics):
        table.add_row(escape(printable(name)), f"{metrics[name]:.4g}")
    if table.row_count:
        console.print(table)

    def print_line(line: str) -> None:  # unbroken in a narrow terminal, so that it can be copied
        console.print(printable(line), soft_wrap=True, markup=False, highlight=False)

    for early in trainer.early_stopping_callbacks if trainer.should_stop else ():
        if isinstance(early, EarlyStopping) and early.stopping_reason_message:
            value = metrics.get(early.monitor)
            at = "" if value is None else f" at {early.monitor} {value:.4g}"
            reason = early.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
            print_line(f"stopped early{at}: {reason}")
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    # The last checkpoint, or else the best one.
    paths = [callback.last_model_path for callback in callbacks] + [callback.best_model_path for callback in callbacks]
    checkpoint = next((path for path in paths if path), "")
    if checkpoint:
        print_line(f"checkpoint: {checkpoint}")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            print_line(f"look:       {python()} -m tensorboard.main --logdir {quoted(str(logger.save_dir))}")
        elif isinstance(logger, MLFlowLogger):
            print_line(f"look:       {python()} -m mlflow ui --backend-store-uri {quoted(logger._tracking_uri)}")
    if profile := _profile_of(trainer):
        print_line(f"profile:    {profile}")
    if checkpoint and is_overridden("predict_step", model):
        sharded = " --trainer.strategy fsdp2" if _is_sharded(Path(checkpoint)) else ""
        print_line(f"predict:    {program_name()} predict --ckpt_path {quoted(checkpoint)}{sharded}")


def _profile_of(trainer: "Trainer") -> Path | None:
    """Return the file that a profiler has written."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if not (profiler.filename and profiler.dirpath):
        return None
    return Path(profiler.dirpath, profiler._prepare_filename())


def _is_sharded(checkpoint: Path) -> bool:
    if not checkpoint.is_dir():
        return False
    from lightning_muon.strategies import is_checkpoint_folder  # noqa: PLC0415

    return is_checkpoint_folder(checkpoint)


def hush_lightning(*, fitting: bool) -> None:
    """Filter out Lightning's advertisements, and its warnings about its own code.

    Args:
        fitting: Whether the run saves checkpoints. Otherwise the warning about their folder is filtered out too.
    """
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # It logs nevertheless: steps are counted over epochs.
    warnings.filterwarnings("ignore", message=r"The number of training batches \(\d+\) is smaller than the logging")
    if not fitting:
        warnings.filterwarnings("ignore", message="The dirpath has changed")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in str(record.msg)
