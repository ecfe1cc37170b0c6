"""A GAN by manual optimization, with an optimizer for each network, on one device or sharded."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.strategies import FSDP2Strategy

NOISE, WIDTH, POINTS, BATCH, STEPS, EPOCHS = 3, 12, 2, 8, 3, 2

Result = dict[str, Any]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(self.norm(x)))


def network(inputs: int, outputs: int) -> nn.Sequential:
    blocks = nn.Sequential(Residual(), Residual())
    return nn.Sequential(nn.Linear(inputs, WIDTH), blocks, nn.Linear(WIDTH, outputs))


class Adversarial(LightningModule):
    """Args: in ``configure_model``, whether the networks are made there; ``toggle``, whether each step freezes one."""

    def __init__(self, in_configure_model: bool = False, toggle: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.generator: nn.Module | None = None
        self.critic: nn.Module | None = None
        if not in_configure_model:
            self.make()

    def configure_model(self) -> None:
        if self.generator is None:
            self.make()

    def make(self) -> None:
        torch.manual_seed(0)
        self.generator, self.critic = network(NOISE, POINTS), network(POINTS, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        noise, real = batch.split([NOISE, POINTS], dim=-1)
        assert self.generator is not None
        assert self.critic is not None
        for index, optimizer in enumerate(self.optimizers()):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            fake = self.generator(noise)
            if index == 0:
                loss = softplus(-self.critic(fake)).mean()
            else:
                loss = (softplus(self.critic(fake.detach())) + softplus(-self.critic(real))).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        # float32 throughout: sums in another order are all that may differ.
        exact = {"orthogonalizer_options": {"dtype": "float32"}, "communication_dtype": "float32", "eps": 1e-3}
        optimizers: list[torch.optim.Optimizer] = [
            MuonAdamW(route_parameters(self, part=part), lr=lr, **exact)
            for part, lr in ((self.generator, 0.02), (self.critic, 0.05))
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Other batches in each epoch."""
        generator = torch.Generator().manual_seed(self.trainer.current_epoch)
        batches = torch.randn(STEPS, BATCH, NOISE + POINTS, generator=generator)
        mine = batches.chunk(self.trainer.world_size, dim=1)[self.trainer.global_rank]
        return DataLoader(list(mine), batch_size=None)  # type: ignore[arg-type]


def fit(
    strategy: Any, epochs: int = EPOCHS, resume: str | None = None, save: str | None = None, **options: Any
) -> Result:
    module = Adversarial(**options)
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if strategy != "auto" else 1,
        strategy=strategy,
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save, weights_only=False)
    return {
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
        "momentum": [
            {name: whole(optimizer.state[parameter]["momentum_buffer"])}
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            if group["algorithm"] == "muon"
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ],
        "groups": [[(g["name"], g["lr"]) for g in optimizer.param_groups] for optimizer in trainer.optimizers],
        "sharded": all(isinstance(p, DTensor) for p in module.parameters()),
    }


def whole(value: Any) -> Tensor:
    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().clone()


def run(folder: str) -> dict[str, Result]:
    """All ways; those on one device on rank 0 alone."""

    def strategy(**options: Any) -> FSDP2Strategy:
        return FSDP2Strategy(process_group_backend="gloo", **options)

    found = {
        "straight": fit(strategy()),
        "made in configure_model, nothing frozen": fit(strategy(), in_configure_model=True, toggle=False),
    }
    for kind in ("sharded", "full"):
        path = str(Path(folder, f"{kind}.ckpt"))
        fit(strategy(state_dict_type=kind), 1, save=path)
        found[f"resumed, {kind}"] = fit(strategy(), resume=path)
    if dist.get_rank() == 0:
        found["one device"] = fit("auto")
        found["resumed on one device"] = fit("auto", resume=str(Path(folder, "full.ckpt")))
    return found
