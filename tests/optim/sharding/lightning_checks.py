"""Under Lightning's own strategies: the optimizer finds out by itself where the parameters live."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.optim.sharding.dtensor import local_tensor
from lightning_muon.strategies import FSDP2Strategy, follow_groups
from tests.earlier_groups import earlier_groups
from tests.on_ranks import FSDPOnCPU

EPOCHS = 2
MUON_ELEMENTS = 15 * 8 + 15 * 15


class Module(LightningModule):
    def __init__(self, earlier: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.earlier = earlier
        self.net = nn.Sequential(nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 15), nn.Tanh(), nn.Linear(15, 3))
        self.options = options

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        groups = route_parameters(self)
        groups = earlier_groups(groups, backwards=True) if self.earlier else groups
        options = {"lr": 0.01, "orthogonalizer_options": {"dtype": "float32"}, **self.options}
        cycle = options.pop("cycle", False)
        optimizer = MuonAdamW(groups, **options)
        schedule: LRScheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if cycle:
            schedule = OneCycleLR(optimizer, max_lr=0.02, total_steps=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            follow_groups(config.scheduler, config.scheduler.optimizer.param_groups)


fsdp = partial(FSDPOnCPU, auto_wrap_policy={nn.Linear}, state_dict_type="sharded")


def fit(strategy: Strategy | str, epochs: int = EPOCHS, checkpoint: str | None = None, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(64, 8, generator=generator), torch.randn(64, 3, generator=generator))
    spread = isinstance(strategy, Strategy)
    world_size = dist.get_world_size() if spread else 1
    sampler = DistributedSampler(data, shuffle=False) if spread else None
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        plugins=[Environment()] if spread else [],
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(data, batch_size=16 // world_size, sampler=sampler)
    trainer.fit(Module(**options), loader, ckpt_path=checkpoint)
    return trainer


class Environment(LightningEnvironment):
    """The processes are there already, and know of each other."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def set_world_size(self, size: int) -> None: ...

    def set_global_rank(self, rank: int) -> None: ...


def parameters(trainer: Trainer) -> list[tuple[str, nn.Parameter]]:
    return list(trainer.lightning_module.named_parameters())


def plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def weights(trainer: Trainer) -> Tensor:
    """This rank's part of them."""
    return torch.cat([local_tensor(p.detach()).flatten() for _, p in parameters(trainer)])


def resumes(strategy: Any, earlier: bool = False, **options: Any) -> tuple[Trainer, Trainer]:
    """Train straight through, and with a checkpoint in the middle, of the groups of version 0.1 if ``earlier``."""
    straight = fit(strategy(), **options)
    half = fit(strategy(), EPOCHS // 2, earlier=earlier, **options)
    path = [f"{type(half.strategy).__name__}-{len(options)}{'-earlier' * earlier}.ckpt"]
    half.save_checkpoint(path[0])
    resumed = fit(strategy(), checkpoint=path[0], **options)
    assert torch.equal(weights(straight), weights(resumed))
    return straight, resumed


def check_ddp() -> None:
    one = fit("auto")
    ddp = partial(DDPStrategy, process_group_backend="gloo")
    for options in ({}, {"shard_state": True}):
        straight, _ = resumes(ddp, **options)
        torch.testing.assert_close(weights(straight), weights(one), atol=1e-5, rtol=0)
        states = straight.optimizers[0].state.values()
        momentum = sum(state["momentum_buffer"].numel() for state in states if "momentum_buffer" in state)
        assert (momentum < MUON_ELEMENTS) == bool(options)


def check_earlier_groups_resume_exactly() -> None:
    options = {"adamw_lr": 0.004}
    ddp = partial(DDPStrategy, process_group_backend="gloo")
    for strategy in (ddp, fsdp, partial(FSDP2Strategy, blocks=["Linear"], process_group_backend="gloo")):
        straight, resumed = resumes(strategy, earlier=True, **options)
        for key in ("name", "lr", "initial_lr", "param_names"):
            assert [[g[key] for g in t.optimizers[0].param_groups] for t in (straight, resumed)] == [
                [g[key] for g in straight.optimizers[0].param_groups]
            ] * 2


def check_ddp_hands_a_checkpoint_to_one_device() -> None:
    if dist.get_rank() == 0:
        resumed = fit("auto", checkpoint="DDPStrategy-1.ckpt")
        torch.testing.assert_close(weights(resumed), weights(fit("auto")), atol=1e-5, rtol=0)


def check_fsdp() -> None:
    straight, _ = resumes(fsdp)
    one = fit("auto")
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {plain(n): p.detach() for n, p in parameters(straight)})
    for name, expected in parameters(one):
        found = torch.cat([held[name].flatten() for held in everywhere])
        torch.testing.assert_close(found, expected.detach().flatten(), atol=1e-5, rtol=0)
    groups = straight.optimizers[0].param_groups
    assert groups[0]["param_names"] == ["net.0.weight", "net.2.weight"]


def check_a_cycled_momentum() -> None:
    """Whatever a strategy makes of the groups it saves and loads, ``betas[0]`` and ``momentum`` stay one number."""
    for strategy in (fsdp, FSDP2Strategy):
        for trainer in resumes(strategy, cycle=True):
            group = trainer.optimizers[0].param_groups[0]
            assert group["algorithm"] == "muon"
            assert 0.85 < group["momentum"] < 0.95
            group["betas"] = (0.5, 0.9)
            assert group["momentum"] == 0.5


def check_one_device_after_several() -> None:
    """A description of where parameters lived does not outlive its run."""
    module = Module()
    for strategy in (DDPStrategy(process_group_backend="gloo"), "auto"):
        spread = isinstance(strategy, Strategy)
        trainer = Trainer(
            accelerator="cpu",
            devices=dist.get_world_size() if spread else 1,
            strategy=strategy,
            plugins=[Environment()] if spread else [],
            max_steps=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(4, 8), torch.randn(4, 3)), batch_size=4))
        assert all("shardings" not in group for group in route_parameters(module))
