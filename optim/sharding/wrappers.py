"""What the wrappers of a module say about where its parameters live."""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.optim.sharding.dtensor import is_dtensor
from lightning_muon.optim.sharding.fully_sharded_data_parallel import fsdp1_shardings
from lightning_muon.optim.sharding.sharding import Sharding, replicated


def find_shardings(module: nn.Module) -> dict[Tensor, Sharding]:
    """Describe those parameters of a module that are spread over ranks and cannot tell it themselves.

    The wrappers, DistributedDataParallel and FullyShardedDataParallel, are looked for in the module itself and, for a
    LightningModule that is being trained, around it. No communication: any rank may ask alone.

    Args:
        module: The model, or the wrapper around it.

    Returns:
        The sharding of each such parameter. Neither what is whole on one rank nor a DTensor is in it.
    """
    roots = [module]
    around = _wrapper_of_strategy(module)
    if around is not None:
        roots.append(around)
    shardings: dict[Tensor, Sharding] = {}
    for root in roots:
        for part in root.modules():
            if isinstance(part, DistributedDataParallel):
                shardings.update(_of_ddp(part))
    for root in roots:
        shardings.update(fsdp1_shardings(root))
    return shardings


def without_ddp(module: nn.Module) -> nn.Module:
    """Return the model in a DistributedDataParallel, whose names are those on one device; any other as it is."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _of_ddp(ddp: DistributedDataParallel) -> dict[Tensor, Sharding]:
    return {
        parameter: replicated(parameter.shape, ddp.process_group)
        for name, parameter in ddp.module.named_parameters()
        if name not in ddp.parameters_to_ignore and not is_dtensor(parameter)
    }


def _wrapper_of_strategy(module: nn.Module) -> nn.Module | None:
    """Return what Lightning's strategy has put around a LightningModule, if it trains this one."""
    try:
        trainer = getattr(module, "trainer", None)
    except RuntimeError:  # of a LightningModule without one
        return None
    wrapper = getattr(getattr(trainer, "strategy", None), "model", None)
    if isinstance(wrapper, nn.Module) and any(part is module for part in wrapper.modules()):
        return wrapper
    return None
