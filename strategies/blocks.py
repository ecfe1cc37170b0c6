"""The blocks of a model: the modules that are sharded one by one, each gathered only while it runs."""

import difflib
from collections.abc import Callable, Sequence
from itertools import chain

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_muon.optim.routing.repeated import repeated_modules

BlockPolicy = Callable[[str, nn.Module], bool]
"""Takes the name of a module and the module, and returns whether it is a block."""


def find_blocks(root: nn.Module, blocks: Sequence[str] | BlockPolicy | None = None) -> list[nn.Module]:
    """Find the blocks of a model, inner blocks before the ones that contain them.

    Args:
        root: The model; it is never a block itself.
        blocks: Names of classes, such as ``["Block"]``; or a function ``(name, module) -> bool``. ``None`` takes the
            modules whose class occurs at least twice in one ``ModuleList``, ``ModuleDict`` or ``Sequential``, which are
            the layers of nearly every model. If they are nested, it takes the outermost.

    Returns:
        The blocks, without any that shares a parameter with the rest of the model, such as an embedding tied to the
        head: tied parameters must be gathered together.

    Raises:
        ValueError: If a name or the function matches no module.
    """
    if blocks is None:
        found = [module for _, module in repeated_modules(root, _has_parameters)]
    elif callable(blocks):
        found = [module for name, module in root.named_modules() if module is not root and blocks(name, module)]
        if not found:
            raise ValueError(f"blocks: the function {blocks} matches no module of {type(root).__name__}")
    else:
        found = _of_classes(root, blocks)
    holders: dict[int, set[int]] = {}  # by the id of a parameter, the ids of the modules that hold it directly
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    return [block for block in reversed(found) if _shares_no_parameter(block, holders)]


def _of_classes(root: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = [module for module in root.modules() if module is not root and _has_parameters(module)]
    classes = sorted({type(module).__name__ for module in modules})
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            raise ValueError(
                f"blocks: {type(root).__name__} has no module of class {name!r}"
                f"{f'; did you mean {near[0]!r}?' if near else '.'} There are {', '.join(classes) or 'none'}"
            )
    return [module for module in modules if type(module).__name__ in names]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _shares_no_parameter(block: nn.Module, holders: dict[int, set[int]]) -> bool:
    inside = {id(module) for module in block.modules()}
    return all(holders[id(parameter)] <= inside for parameter in block.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Return whether any part of a model is sharded."""
    return any(isinstance(part, (FSDPModule, DTensor)) for part in chain(model.modules(), model.parameters()))


def check_complete(model: nn.Module) -> None:
    """Raise a ValueError that names the parameters that ``configure_model`` has left unsharded."""
    left = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if left:
        raise ValueError(
            f"configure_model has left {', '.join(left)} unsharded: each rank would train its own copy. Shard them as"
            " well, for example with fully_shard(self, mesh=self.device_mesh['data_parallel']) at its end"
        )
