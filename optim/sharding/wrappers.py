"""Adapters: what the wrappers of DDP and FSDP1 say about the parameters of a model.

FSDP1, torch's FullyShardedDataParallel, flattens the parameters of a module into one flat parameter and cuts that into
equal chunks, at any element of a row. The cuts are found only in its private attributes, which no other file reads.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.optim.sharding.dtensor import is_dtensor
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
        shardings.update(_fsdp1_shardings(root))
    return shardings


def find_ddp(module: nn.Module) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel in a module and, for a LightningModule in training, around it."""
    around = _wrapper_of_strategy(module)
    roots = [module] if around is None else [module, around]
    return [wrapper for root in roots for wrapper in root.modules() if isinstance(wrapper, DistributedDataParallel)]


def reduce_unfrozen(ddp: DistributedDataParallel) -> None:
    """Let DDP average the gradients of all parameters that take one now.

    It looks once, when it wraps the module: those that are unfrozen later would get gradients of each rank's own data.
    Between steps, on all ranks.

    Raises:
        RuntimeError: If the private attributes of this version of torch differ, or a communication hook is registered.
    """
    if ddp._comm_hooks:
        raise RuntimeError("DistributedDataParallel has a communication hook: it cannot reduce what is unfrozen later")
    try:
        parameters, sparse = ddp._build_params_for_reducer()
        names = ddp._build_debug_param_to_name_mapping(parameters)
        ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    except (AttributeError, TypeError) as error:
        raise RuntimeError(f"cannot let DDP of this torch reduce what was unfrozen: {error}") from error


def without_ddp(module: nn.Module) -> nn.Module:
    """Return the model inside a DistributedDataParallel, with the names of one device; any other module as it is."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def is_flattened(parameter: Tensor) -> bool:
    """Return whether FSDP1 has flattened a parameter, of which this rank then has a 1-D range."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def _fsdp1_shardings(root: nn.Module) -> dict[Tensor, Sharding]:
    """Describe the parameters of all FSDP1 modules in a module. No communication.

    Raises:
        ValueError: If a module was wrapped with ``use_orig_params=False``, or a weight is not row-major.
        RuntimeError: If the private attributes of this version of torch differ.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrappers = [m for m in root.modules() if isinstance(m, fsdp.FullyShardedDataParallel)] if fsdp else []
    shardings: dict[Tensor, Sharding] = {}
    for wrapper in wrappers:
        try:
            if wrapper._handle is not None:
                shardings.update(_of_handle(wrapper._handle))
        except AttributeError as error:
            raise RuntimeError(f"cannot read the shards of {type(wrapper).__name__} in this torch: {error}") from error
    return shardings


@contextmanager
def full_shapes(module: nn.Module, shardings: Mapping[Tensor, Sharding]) -> Iterator[dict[int, nn.Parameter]]:
    """Replace each flattened parameter of a module, inside this context, by an empty stand-in of its full shape.

    The role of a parameter is found from shapes, but FSDP1 leaves only 1-D ranges.

    Yields:
        The module's own parameter by the ``id`` of its stand-in.

    Raises:
        ValueError: If FSDP1 has flattened a parameter that has no sharding.
    """
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            sharding = shardings.get(parameter)
            if sharding is None and is_flattened(parameter):
                raise ValueError(
                    f"{path}.{name} is a piece of what FSDP has flattened, and its shape is not known here:"
                    " route the module that FSDP wraps, or the LightningModule"
                )
            if sharding is not None and sharding.shape != parameter.shape:
                replaced.append((owner, name, parameter))
                stand_ins[parameter] = _stand_in(parameter, sharding.shape)
    try:
        for owner, name, parameter in replaced:
            owner._parameters[name] = stand_ins[parameter]
        yield {id(stand_in): parameter for parameter, stand_in in stand_ins.items()}
    finally:
        for owner, name, parameter in replaced:
            owner._parameters[name] = parameter


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


def _of_handle(handle: Any) -> dict[Tensor, Sharding]:
    flat, group = handle.flat_param, handle.process_group
    if flat._params is None:
        raise ValueError(
            f"FSDP has flattened {', '.join(flat._fqns)} into one parameter: wrap the model with use_orig_params=True,"
            " so that each parameter can go to its own algorithm"
        )
    if not handle.uses_sharded_strategy:
        return {p: replicated(shape, group) for p, shape in zip(flat._params, flat._shapes, strict=True)}
    chunk = flat._sharded_size.numel()
    offsets = [
        start
        for (start, _), is_padding in zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
        if not is_padding
    ]
    shardings: dict[Tensor, Sharding] = {}
    for parameter, name, shape, contiguous, offset in zip(
        flat._params, flat._fqns, flat._shapes, flat._contiguities, offsets, strict=True
    ):
        if not contiguous:
            raise ValueError(
                f"{name} is not contiguous, so FSDP cuts it out of order: make it contiguous before wrapping"
            )
        bounds = [min(max(rank * chunk - offset, 0), shape.numel()) for rank in range(group.size() + 1)]
        shardings[parameter] = Sharding(shape, group, tuple(pairwise(bounds)))
        start, stop = shardings[parameter].shard
        if handle.is_sharded(flat) and parameter.numel() != stop - start:
            raise RuntimeError(f"{name}: FSDP has {parameter.numel()} elements here, not the range {start, stop}")
    for parameter, (_, _, _, primary_name, primary_module, _) in zip(
        flat._shared_params, flat._shared_param_infos, strict=True
    ):
        shardings[parameter] = shardings[getattr(primary_module, primary_name)]
    return shardings


def _stand_in(parameter: nn.Parameter, shape: torch.Size) -> nn.Parameter:
    stand_in = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), parameter.requires_grad)
    stand_in.__dict__.update(parameter.__dict__)  # such as Mamba's mark of parameters without weight decay
    return stand_in
