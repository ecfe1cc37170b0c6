"""Run the commands of a generated project's README, in one process and on a small network."""

import contextlib
import importlib
import io
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_muon.cli import main

TRAINER = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
]
# With a trainer; the other commands read finished runs.
TRAINING = {"fit": [*TRAINER, "--trainer.max_steps=2"], "predict": TRAINER[:2]}
SECTIONS = ("--model.", "--data.")


def run(commands: Sequence[str], classes: tuple[str, str], small: Sequence[str]) -> None:
    """Run commands of ``fit`` and others, in the working directory, which is the project.

    Args:
        commands: What stands behind the name of the program.
        classes: The names of the module and of the data module.
        small: Options that make network and data small; those of the command have priority.
    """
    module, data = (
        getattr(importlib.import_module(f"my_muon_project.{part}"), name)
        for part, name in zip(("module", "data"), classes, strict=True)
    )
    for command in commands:
        subcommand, *options = shlex.split(command, comments=True)
        asked = {option.partition("=")[0] for option in options}
        newest = max(Path("logs").rglob("last.ckpt"), key=lambda path: path.stat().st_mtime, default=Path("none"))
        options = [str(newest) if "…" in option else option for option in options]
        own = "--model" in asked or "--data" in asked or "--weights" in asked
        sizes = [option for option in small if option.partition("=")[0] not in asked]
        if "--model.net" in asked:
            sizes = [option for option in sizes if not option.startswith("--model.net.")]
        quick = TRAINING.get(subcommand, [])
        if subcommand not in {"fit", "routes"} or own:
            sizes = [option for option in sizes if option.startswith("--data.") and not own and subcommand == "predict"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                main(module, data, default_config="configs/default.yaml", args=[subcommand, *quick, *sizes, *options])
            except SystemExit as end:
                assert not end.code, f"{command}: {errors.getvalue()}"
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
