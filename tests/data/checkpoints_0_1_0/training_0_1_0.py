"""The training that wrote the checkpoints in this folder. Later versions must resume them exactly.

Version 0.1.0 wrote them, with the first layout of its packages (``optim`` without ``polar`` and ``update``), with torch
2.13 and lightning 2.6.6 on a CPU. The commands, with the Python that has that version installed::

    OMP_NUM_THREADS=1 python training_0_1_0.py FOLDER one_device
    OMP_NUM_THREADS=1 python training_0_1_0.py FOLDER sharded
    tar -C FOLDER -czf FOLDER/sharded.tar.gz sharded

Each place saves a checkpoint at step ``SAVED_AT``: ``one_device.pt``, and ``sharded``, the folder that fsdp2 writes on
two processes. It then resumes from it and saves the weights of step ``STEPS`` as ``one_device_weights.pt`` and
``sharded_weights.pt``. Do not write these files again with a later version.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_muon.callbacks import AutoWeightDecay, OrthogonalityMonitor, WeightRMSMonitor
from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.strategies import FSDP2Strategy  # noqa: F401 - makes the strategy "fsdp2" known

SAVED_AT, STEPS = 6, 12
SYMBOLS, DIM, EXPERTS = 11, 6, 3


class Experts(nn.Module):
    """Stacks of matrices: (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 8, DIM) / 3)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, DIM, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bsi,eoi->ebso", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("ebso,eio->bsi", gate.sigmoid() * up, self.down_proj)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class NextSymbol(LightningModule):
    """Predicts the next symbol of a sequence; on several processes each takes a part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(SYMBOLS, DIM)
        self.attention = Attention()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.experts = Experts()
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, SYMBOLS, bias=False)
        self.batches = torch.randint(SYMBOLS, (STEPS, 8, 6), generator=torch.Generator().manual_seed(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = self.batches[self.global_step].chunk(self.trainer.world_size)[self.global_rank]
        x = self.embedding(tokens[:, :-1])
        x = x + self.attention(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x + self.experts(x))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(
            route_parameters(self),
            lr=0.02,
            neuron_beta=0.95,
            eps=1e-3,
            # Sums in another order are all that may differ between one device and two.
            orthogonalizer_options={"dtype": "float32"},
            communication_dtype="float32",
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS + 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(STEPS))  # type: ignore[arg-type]


def train(steps: int, *, processes: int = 1, resume: Path | None = None, save: Path | None = None) -> dict[str, Tensor]:
    """Train up to a step, under fsdp2 if there are several processes, and return the whole weights."""
    callbacks = [
        AutoWeightDecay(target_rms=0.25, horizon=50, ramp_steps=4, every_n_steps=1),
        WeightRMSMonitor(every_n_steps=1),
        OrthogonalityMonitor(every_n_steps=1),
    ]
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="fsdp2" if processes > 1 else "auto",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = NextSymbol()
    trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
    if save:
        trainer.save_checkpoint(save)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w.clone() for name, w in weights.items()}


def train_on_two_processes(checkpoints: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    """Resume each checkpoint on this process, one of two that were started as by ``torchrun``; return the weights."""
    return {place: train(STEPS, processes=2, resume=checkpoint) for place, checkpoint in checkpoints.items()}


def main() -> None:
    folder, place = Path(sys.argv[1]), sys.argv[2]
    processes = {"one_device": 1, "sharded": 2}[place]
    checkpoint = folder / ("one_device.pt" if processes == 1 else "sharded")
    train(SAVED_AT, processes=processes, save=checkpoint)
    weights = train(STEPS, processes=processes, resume=checkpoint)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(weights, folder / f"{place}_weights.pt")


if __name__ == "__main__":
    main()
