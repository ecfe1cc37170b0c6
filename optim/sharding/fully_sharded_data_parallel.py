"""What FSDP1, torch's FullyShardedDataParallel, says about where parameters live.

It keeps the parameters of a module in one flat parameter that it cuts into equal chunks, wherever this falls in a row.
Its private attributes are the only ones who know: they are read here and nowhere else.
"""

import sys
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lightning_muon.optim.sharding.sharding import Sharding, replicated


def is_flattened(parameter: Tensor) -> bool:
    """Tell whether FSDP1 has taken a parameter, of which this rank then holds some 1-D range."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def fsdp1_shardings(root: nn.Module) -> dict[Tensor, Sharding]:
    """Describe the parameters of all FSDP1 modules in a module. No communication.

    Raises:
        ValueError: If a module was wrapped with ``use_orig_params=False``, or a weight is not row-major.
        RuntimeError: If this version of torch keeps its books in another way.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrappers = [m for m in root.modules() if isinstance(m, fsdp.FullyShardedDataParallel)] if fsdp else []
    shardings: dict[Tensor, Sharding] = {}
    for wrapper in wrappers:
        try:
            handle = wrapper._handle
            if handle is not None:
                shardings.update(_of_handle(handle))
        except AttributeError as error:
            raise RuntimeError(f"cannot read the shards of {type(wrapper).__name__} in this torch: {error}") from error
    return shardings


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
        held = shardings[parameter].held
        if handle.is_sharded(flat) and parameter.numel() != held[1] - held[0]:
            raise RuntimeError(f"{name}: FSDP holds {parameter.numel()} elements here, not the range {held}")
    for parameter, (_, _, _, primary_name, primary_module, _) in zip(
        flat._shared_params, flat._shared_param_infos, strict=True
    ):
        shardings[parameter] = shardings[getattr(primary_module, primary_name)]
    return shardings
