"""What each of two processes runs: the program of a generated project, several times."""

from pathlib import Path

import torch
from lightning.pytorch.strategies import FSDPStrategy
from my_muon_project.data import TextData
from my_muon_project.module import TextModule
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_muon import optim
from lightning_muon.cli import main


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses FSDP without a GPU, but only to the class itself."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def run(*command_lines: list[str]) -> None:
    """Call the program with each of the command lines, in the folder of the project."""
    assert Path(optim.__file__).is_relative_to(Path.cwd())
    for arguments in command_lines:
        main(TextModule, TextData, default_config="configs/default.yaml", args=arguments)
