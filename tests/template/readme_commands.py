"""Run the commands of a generated project's README, in one process and on a small network."""

import contextlib
import importlib
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_muon.cli import main

QUICK = {
    "fit": [
        "--trainer.max_steps=2",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.enable_progress_bar=false",
    ],
    "sweep": [
        "--trainer.max_steps=3",  # images are validated every third epoch
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
        "--trainer.accelerator=cpu",
    ],
    "compare": [
        "--seeds=2",
        "--tune=",
        "--trainer.max_steps=6",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
        "--trainer.accelerator=cpu",
    ],
    "predict": ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
}


def run(commands: Sequence[str], classes: tuple[str, str], small: Sequence[str]) -> None:
    """Run commands in the working directory, which has the files that they name.

    Args:
        commands: What stands behind the name of the program.
        classes: The names of the module and of the data module.
        small: Options that make network and data small; those of the command have priority.

    Raises:
        RuntimeError: If one of them fails.
    """
    module, data = (
        getattr(importlib.import_module(f"my_muon_project.{part}"), name)
        for part, name in zip(("module", "data"), classes, strict=True)
    )
    for command in commands:
        subcommand, *options = shlex.split(command, comments=True)
        newest = max(Path("logs").rglob("last.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
        options = [str(newest) if "…" in option else option for option in options]
        longer = ["--trainer.max_steps=9"] if subcommand == "fit" and "--ckpt_path" in options else []
        arguments = [subcommand, *QUICK.get(subcommand, []), *longer, *_sizes(subcommand, options, small), *options]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                main(module, data, default_config="configs/default.yaml", args=arguments)
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"{command}: {errors.getvalue()}") from end
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _sizes(subcommand: str, options: Sequence[str], small: Sequence[str]) -> list[str]:
    """Return the options for a small network and small data that suit a command."""
    asked = {option.partition("=")[0] for option in options}
    if asked & {"--model", "--weights"}:
        return []
    both = ("--model.", "--data.")
    sections = {**dict.fromkeys(("fit", "sweep", "compare", "routes"), both), "predict": ("--data.",)}
    sizes = [option for option in small if option.startswith(sections.get(subcommand, ()))]
    if "--model.net" in asked:
        sizes = [option for option in sizes if not option.startswith("--model.net.")]
    return [option for option in sizes if option.partition("=")[0] not in asked]
