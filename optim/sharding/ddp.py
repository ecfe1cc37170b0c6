"""Adapters: DistributedDataParallel, and the search for the wrappers of DDP and FSDP1 in a model."""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.optim.sharding.dtensor import is_dtensor
from lightning_muon.optim.sharding.fsdp1 import fsdp1_shardings
from lightning_muon.optim.sharding.sharding import Sharding, replicated


def find_shardings(module: nn.Module) -> dict[Tensor, Sharding]:
    """Describe the parameters of a module that are distributed over ranks and are no DTensors. No communication.

    The wrappers, DistributedDataParallel and FullyShardedDataParallel, are looked for in the module itself and, for a
    LightningModule in training, around it.
    """
    around = _wrapper_of_strategy(module)
    roots = [module] if around is None else [module, around]
    shardings = {
        parameter: replicated(parameter.shape, ddp.process_group)
        for root in roots
        for ddp in root.modules()
        if isinstance(ddp, DistributedDataParallel)
        for name, parameter in ddp.module.named_parameters()
        if name not in ddp.parameters_to_ignore and not is_dtensor(parameter)
    }
    for root in roots:
        shardings.update(fsdp1_shardings(root))
    return shardings


def without_ddp(module: nn.Module) -> nn.Module:
    """Return the model inside a DistributedDataParallel, with the names of one device; any other module as it is."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _wrapper_of_strategy(module: nn.Module) -> nn.Module | None:
    """Return the wrapper that Lightning's strategy has put around a LightningModule in training."""
    try:
        trainer = getattr(module, "trainer", None)
    except RuntimeError:  # a LightningModule without a trainer
        return None
    wrapper = getattr(getattr(trainer, "strategy", None), "model", None)
    if isinstance(wrapper, nn.Module) and any(part is module for part in wrapper.modules()):
        return wrapper
    return None
