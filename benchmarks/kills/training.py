"""The training that is killed: a small model that saves ``last.ckpt`` after each step."""

import hashlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.strategies import (
    AsyncAtomicCheckpointIO,
    AtomicCheckpointIO,
    FSDP2Strategy,
    clear_leftovers,
    find_whole,
)
from lightning_muon.strategies.checkpoint_folder import read_checkpoint_folder, split_checkpoint

LAST = "last.ckpt"
PROGRESS = "progress"
WIDTH = 64


class Regression(LightningModule):
    """Its batch depends on the step alone, so a resumed run sees what the run before would have seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.global_step + self.global_rank)
        x = torch.randn(8, WIDTH, generator=generator)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        loss: Tensor = (self.head(x) - 1).square().mean()
        return loss

    @override
    def configure_optimizers(self) -> MuonAdamW:
        return MuonAdamW(route_parameters(self), lr=0.02)

    @override
    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(1_000_000), batch_size=1)  # type: ignore[arg-type]


class InPlace(FSDP2Strategy):
    """Save sharded checkpoints as Lightning's own strategies do: each file over the one before it."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        folder = Path(self.broadcast(str(filepath)))
        folder.mkdir(parents=True, exist_ok=True)
        tensors, rest = split_checkpoint(checkpoint)
        save(tensors, checkpoint_id=folder, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
        if self.is_global_zero:
            torch.save(rest, folder / "meta.pt")


class AnnouncedCheckpoint(ModelCheckpoint):
    """Save ``last.ckpt`` after each step, and then append the step to a file.

    Args:
        folder: Where both are.
        behind: How many of the last saves may not be complete yet when they return.
        digests: Whether to append the digest of the checkpoint too.
    """

    def __init__(self, folder: Path, behind: int, digests: bool) -> None:
        # Otherwise Lightning would number the checkpoints of each process: last-v1.ckpt.
        super().__init__(folder, save_last=True, save_top_k=0, every_n_train_steps=1, enable_version_counter=False)
        self._behind = behind
        self._digests = digests

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.is_global_zero:
            folder = Path(str(self.dirpath))
            digest = read(folder / LAST)[1] if self._digests else ""
            with (folder / PROGRESS).open("a") as file:
                file.write(f"{trainer.global_step - self._behind} {digest}\n")


def train(
    folder: Path, steps: int, kind: str, rank: int = 0, ranks: int = 1, port: int = 0, digests: bool = False
) -> None:
    """Train to a number of steps, from ``last.ckpt`` if there is one.

    Args:
        folder: Where the checkpoint lies.
        steps: Number of steps in all.
        kind: ``"atomic"``, ``"asynchronous"``, or ``"Lightning"`` for the way of its own classes.
        rank: Of this process.
        ranks: Number of processes; with two, the checkpoint is sharded.
        port: For the processes to meet.
        digests: Whether to write the digest of each checkpoint to the progress file.
    """
    _quiet(folder)
    torch.set_num_threads(1)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    os.environ.update({key: str(value) for key, value in world.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "kills"})
    plugins: dict[str, Any] = {
        "atomic": AtomicCheckpointIO(),
        "asynchronous": AsyncAtomicCheckpointIO(),
        "Lightning": TorchCheckpointIO(),
    }
    last = folder / LAST
    if kind != "Lightning":  # as `fit --ckpt_path` does
        find_whole(last, quick=True)
        clear_leftovers(folder)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else InPlace() if kind == "Lightning" else FSDP2Strategy(),
        plugins=[plugins[kind], TorchElasticEnvironment() if ranks > 1 else LightningEnvironment()],
        max_steps=steps,
        callbacks=[AnnouncedCheckpoint(folder, 1 if kind == "asynchronous" else 0, digests)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Regression(), ckpt_path=str(last) if last.exists() else None)


def _quiet(folder: Path) -> None:
    """Keep what Lightning and the errors of killed processes write out of the table."""
    warnings.simplefilter("ignore")
    sys.stdout.flush()
    with (folder / "output").open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def read(last: Path) -> tuple[int, str]:
    """Return the step of a checkpoint, and a digest of its weights and its optimizer's state."""
    checkpoint = read_checkpoint_folder(last) if last.is_dir() else torch.load(last, weights_only=True)
    digest = hashlib.sha256()
    _add(digest, [checkpoint["state_dict"], [state["state"] for state in checkpoint["optimizer_states"]]])
    return int(checkpoint["global_step"]), digest.hexdigest()


def _add(digest: Any, tree: Any) -> None:
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            digest.update(str(key).encode())
            _add(digest, tree[key])
    elif isinstance(tree, list):
        for value in tree:
            _add(digest, value)
    elif isinstance(tree, Tensor):
        digest.update(tree.contiguous().numpy().tobytes())
    else:
        digest.update(repr(tree).encode())
