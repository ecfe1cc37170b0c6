"""Short trainings of a generated project with presets of the optimizer, by the command line."""

from pathlib import Path
from typing import Any

import torch
from my_muon_project.data import TextData
from my_muon_project.module import TextModule

from lightning_muon.cli import MuonCLI

NETWORK = ["--model.net.dim=32", "--model.net.depth=2", "--model.net.heads=2"]
SMALL = [*NETWORK, "--model.context=32", "--data.batch_size=8"]
QUIET = [
    "--trainer.callbacks=[]",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
]


class Recorded(TextModule):
    def on_train_start(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(configs: Path, presets: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """Return by preset the losses, the groups without their parameters, and the dtypes of the state."""
    found = {}
    for preset in presets:
        chosen = [f"--config={configs / 'optimizer' / preset}.yaml", f"--trainer.max_steps={steps}"]
        arguments = ["fit", *chosen, *SMALL, *QUIET]
        run = MuonCLI(Recorded, TextData, default_config=configs / "default.yaml", args=arguments)
        (optimizer,) = run.trainer.optimizers
        state = {v.dtype for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)}
        groups = [
            {key: value for key, value in group.items() if key not in {"params", "reasons"}}
            for group in optimizer.param_groups
        ]
        found[preset] = {"losses": run.model.losses, "groups": groups, "state": sorted(map(str, state))}
    return found
