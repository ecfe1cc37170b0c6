"""Short trainings of a generated project of any task, by its command line; run in its folder."""

import contextlib
import importlib
import io
from typing import Any

import torch

from lightning_muon.cli import MuonCLI, main

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=2",
]


def call(classes: tuple[str, str], *arguments: str) -> tuple[MuonCLI | None, str]:
    """Return the program after its end, ``None`` if it is one without a trainer, and what it wrote to stdout."""
    module, data = (
        getattr(importlib.import_module(f"my_muon_project.{part}"), name)
        for part, name in zip(("module", "data"), classes, strict=True)
    )
    with contextlib.redirect_stdout(io.StringIO()) as written:
        try:
            program = main(module, data, default_config="configs/default.yaml", args=arguments)
        except SystemExit as end:
            if end.code:
                raise
            program = None
    return program, written.getvalue()


def train(classes: tuple[str, str], options: list[str], predict: list[str]) -> dict[str, Any]:
    """Fit four steps and six, the second from the checkpoint of the first; validate; predict; print the routes.

    Args:
        classes: The names of the module and of the data module.
        options: Of the training.
        predict: Of ``predict``, which gets no others beside the checkpoint.
    """
    fitted, table = call(classes, "fit", *options, *QUIET, "--trainer.max_steps=4")
    straight, _ = call(classes, "fit", *options, *QUIET, "--trainer.max_steps=6", "--model.lr_scheduler=null")
    _, routes = call(classes, "routes", *options)
    checkpoint = f"--ckpt_path={fitted.trainer.checkpoint_callback.last_model_path}"
    resumed, _ = call(classes, "fit", *options, *QUIET, checkpoint, "--trainer.max_steps=6")
    validated, _ = call(classes, "validate", *options, *QUIET, checkpoint)
    predicted, _ = call(classes, "predict", *QUIET[:-2], checkpoint, *predict)
    weights = [list(each.model.parameters()) for each in (fitted, validated, predicted)]
    return {
        "steps": [each.trainer.global_step for each in (fitted, straight, resumed)],
        "metrics": {key: float(value) for key, value in fitted.trainer.callback_metrics.items()},
        "same": all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*weights, strict=True)),
        "roles": {
            name: group["role"] for group in fitted.trainer.optimizers[0].param_groups for name in group["param_names"]
        },
        "predictions": predicted.trainer.predict_loop.predictions,
        "table": table,
        "routes": routes,
    }


def ranks(classes: tuple[str, str], *command_lines: list[str]) -> None:
    """Call the program with each of the command lines, on one of several ranks."""
    for arguments in command_lines:
        call(classes, *arguments)
