"""The ways to spread a model over processes, and to see its whole weights again."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from model import BATCH, batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.optim import MuonAdamW, Rule, route_parameters


def ddp(model: nn.Module, _block: type[nn.Module]) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp2(model: nn.Module, block: type[nn.Module]) -> nn.Module:
    return _fully_shard(model, block, init_device_mesh("cpu", (dist.get_world_size(),)))


def hsdp(model: nn.Module, block: type[nn.Module]) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return _fully_shard(model, block, mesh)


def fsdp1(model: nn.Module, block: type[nn.Module]) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def _fully_shard(model: nn.Module, block: type[nn.Module], mesh: Any) -> nn.Module:
    for part in list(model.modules()):
        if isinstance(part, block):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WAYS: dict[str, Callable[[nn.Module, type[nn.Module]], nn.Module]] = {
    "ddp": ddp,
    "ddp_sharded_state": ddp,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "fsdp1": fsdp1,
}


def wrap(way: str, model: nn.Module, block: type[nn.Module]) -> nn.Module:
    """Spread a model over all processes; modules of the class ``block`` are sharded one by one."""
    return WAYS[way](model, block)


def make_optimizer(
    model: nn.Module, way: str, rules: Iterable[Rule] = (), *, per_head: bool = False, **options: Any
) -> MuonAdamW:
    """The optimizer of a wrapped model."""
    groups = route_parameters(model, rules, per_head=per_head)
    return MuonAdamW(groups, shard_state=way == "ddp_sharded_state", **options)


def train(
    model: nn.Module, optimizer: MuonAdamW, steps: int, rank: int = 0, world_size: int = 1, start: int = 0
) -> None:
    """Train on the same batches as one device does, shared out among the ranks."""
    mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for tokens, choice, target in batches(start + steps)[start:]:
        optimizer.zero_grad()
        (model(tokens[mine], choice[mine]) - target[mine]).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights, on every rank, by their plain names."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {_plain(n): p.detach().clone() for n, p in model.named_parameters()}
    return {
        _plain(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def _plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
