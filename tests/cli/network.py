"""A module whose network is chosen by config, its data, and runs of it on two ranks."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muon.cli import MuonCLI, main

NETWORK = "tests.cli.network.Net" if __name__.startswith("tests.") else "network.Net"
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": "false",
    "enable_model_summary": "false",
    "limit_val_batches": "0",
    "logger": "false",
    "max_steps": "2",
}


class Net(nn.Module):
    """A small language model of eight tokens."""

    def __init__(self, width: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, 8, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.embedding(tokens)))
        return logits


class NetModule(LightningModule):
    """It trains the network; a weight of its own is no part of that."""

    def __init__(self, net: nn.Module, scale: float = 1.0, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net
        self.temperature = nn.Parameter(torch.ones(1))
        self.optimizer = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.net(batch) / self.temperature
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class LateModule(NetModule):
    """Its network is made when the strategy asks for it."""

    def __init__(self, width: int = 4, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__(nn.Identity(), optimizer=optimizer)
        self.width = width

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net(self.width)


class NetData(LightningDataModule):
    def __init__(self, tokenizer: str = "bytes") -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Tensor]:
        tokens = torch.randint(8, (16, 6), generator=torch.Generator().manual_seed(0))
        return DataLoader(list(tokens), batch_size=4)  # type: ignore[arg-type]


def fit(*arguments: str, module: type[LightningModule] = NetModule) -> MuonCLI:
    """Fit two steps of SGD, or as the arguments say."""
    options = [f"--trainer.{key}={value}" for key, value in QUIET.items()]
    options += [] if module is LateModule else [f"--model.net={NETWORK}"]
    return main(module, NetData, args=["fit", *options, "--model.optimizer=SGD", *arguments])


def begin_on_two_ranks(weights: str, strategies: list[str]) -> None:
    """Begin with weights, take a step of length 0, and save where the strategy's name says."""
    for strategy in strategies:
        options = [f"strategy={strategy}", "devices=2", "max_steps=1", f"default_root_dir={strategy}"]
        trainer = [f"--trainer.{option}" for option in [*options, "callbacks+=EMAWeightAveraging"]]
        fit(*trainer, "--model.optimizer.lr=0", f"--weights={weights}", "--model.net.tied=true")


def begin_late_on_two_ranks(weights: str) -> None:
    """Begin with weights where the network is made after sharding has begun; save in ``late``."""
    options = ["strategy=fsdp2", "devices=2", "max_steps=1", "default_root_dir=late"]
    trainer = [f"--trainer.{option}" for option in options]
    fit(*trainer, "--model.optimizer.lr=0", f"--weights={weights}", module=LateModule)


def last(folder: str | Path) -> Path:
    """Return the one checkpoint below a folder."""
    (path,) = Path(folder).rglob("*.ckpt")
    return path
