"""Short trainings of a generated project with other networks, by the command line."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from my_muon_project.data import TextData
from my_muon_project.module import TextModule
from torch import Tensor, nn

from lightning_muon.cli import MuonCLI

QUIET = [
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
    "--model.context=16",
    "--model.sample_tokens=5",
    "--data.batch_size=4",
    "--data.files=text.txt",
]


class Recurrent(nn.Module):
    """A network of the user's; its first argument has no type."""

    def __init__(self, width, layers: int = 2) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)[0]
        logits: Tensor = self.head(x)
        return logits


def run(configs: Path, subcommand: str, *arguments: str) -> tuple[MuonCLI, str]:
    """Return the program after its end, and what it wrote to stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as written:
        args = [subcommand, *QUIET, *arguments]
        program = MuonCLI(TextModule, TextData, default_config=configs / "default.yaml", args=args)
    return program, written.getvalue()


def train(configs: Path, network: list[str]) -> dict[str, Any]:
    """Fit two steps with all the callbacks of the default config, go on to the third, and predict.

    Args:
        configs: The folder of the project's configs.
        network: The options that choose the network. Only the first run gets them.
    """
    fitted, table = run(configs, "fit", *network, "--trainer.max_steps=2")
    checkpoint = fitted.trainer.checkpoint_callback.last_model_path
    # As config.yaml has it, the third step; and as the checkpoint has it.
    log_dir = Path(str(fitted.trainer.log_dir))
    repeated, _ = run(configs, "fit", f"--config={log_dir / 'config.yaml'}")
    resumed, _ = run(configs, "fit", f"--ckpt_path={checkpoint}", "--trainer.max_steps=3")
    predicted, text = run(configs, "predict", f"--ckpt_path={checkpoint}")
    pairs = zip(fitted.model.parameters(), repeated.model.parameters(), strict=True)
    return {
        "networks": [type(each.model.net).__name__ for each in (fitted, repeated, resumed, predicted)],
        "steps": [each.trainer.global_step for each in (fitted, repeated, resumed)],
        "same": all(torch.equal(a, b) for a, b in pairs),
        "groups": {g["name"]: g["param_names"] for g in fitted.trainer.optimizers[0].param_groups},
        "measured": sorted(name for name in fitted.trainer.callback_metrics if name.startswith("watch/output_rms/")),
        "table": table,
        "text": text,
    }
