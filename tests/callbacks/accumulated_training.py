"""Runs of several ranks whose steps have one number of samples."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_muon.callbacks import SpeedMonitor, TargetBatch
from lightning_muon.report.tags import tag_of


class Samples(BoringModel):
    """64 samples in batches of 2; it keeps the weights after each step."""

    batch_size = 2

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.steps: int | float = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        self.steps = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        samples = TensorDataset(torch.randn(64, 32, generator=generator))
        # In order, which Lightning's own is not.
        sampler: DistributedSampler[Any] = DistributedSampler(
            samples, num_replicas=self.trainer.world_size, rank=self.global_rank, shuffle=False
        )
        return DataLoader(samples, batch_size=2, sampler=sampler)


def run(ranks: int, samples: int) -> dict[str, Any]:
    """Train an epoch, and return what the run was like."""
    model = Samples()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=1,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[TargetBatch(samples=samples), SpeedMonitor()],
    )
    trainer.fit(model)
    return {
        "accumulate": trainer.accumulate_grad_batches,
        "steps": trainer.global_step,
        "estimated": model.steps,
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "speed": float(trainer.callback_metrics[tag_of("throughput/samples_per_second")]),
    }
