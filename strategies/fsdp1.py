"""What Lightning's ``FSDPStrategy`` (FSDP1) lacks: blocks of any model, clipping by norm, a look at the checkpoint."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.strategies.blocks import find_blocks
from lightning_muon.strategies.checkpoint_folder import is_checkpoint_folder


class BlockWrapPolicy(ModuleWrapPolicy):
    """Wraps the modules that ``FSDP2Strategy`` would: ``FSDPStrategy(auto_wrap_policy=BlockWrapPolicy())``.

    Args:
        blocks: Names of classes. Default: the layers that repeat, see :func:`~lightning_muon.strategies.find_blocks`.
    """

    def __init__(self, blocks: list[str] | None = None) -> None:
        super().__init__(module_classes=())
        self.blocks = blocks

    @override
    def _run_policy(
        self, root_module: nn.Module, ignored_modules: set[nn.Module], root_kwargs: dict[str, Any]
    ) -> dict[nn.Module, dict[str, Any]]:
        found = find_blocks(root_module, self.blocks)
        return {block: root_kwargs for block in found if block not in ignored_modules}


class ClippingFSDPPrecision(FSDPPrecision):
    """Lightning's ``FSDPPrecision``, which refuses to clip by norm for want of the wrapped model, with the model.

    Args:
        precision: As in ``Trainer(precision=…)``.
        strategy: Its ``model`` knows the norm of all its shards. It clips all parameters together.
    """

    def __init__(self, precision: Any, strategy: FSDPStrategy) -> None:
        super().__init__(precision)
        self._strategy = strategy

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        model = self._strategy.model
        if not isinstance(model, FullyShardedDataParallel):
            raise TypeError("gradient_clip_algorithm 'norm' needs a model that FSDPStrategy has wrapped as a whole")
        model.clip_grad_norm_(clip_val)


def clip_by_norm(strategy: FSDPStrategy) -> None:
    """Make ``Trainer(gradient_clip_val=…)`` work under this strategy; a precision plugin of the user's stays."""
    if type(strategy.precision_plugin) is FSDPPrecision:
        strategy.precision_plugin = ClippingFSDPPrecision(strategy.precision_plugin.precision, strategy)


def check_resumable(path: Path) -> None:
    """Refuse a checkpoint from which ``FSDPStrategy`` cannot go on training, before it goes on wrongly.

    It takes the numbers of the parameters in an optimizer's state for positions in ``model.parameters()``; in a file of
    one device or DDP they count through the groups. The state would go to other parameters, where shapes allow it in
    silence.

    Raises:
        ValueError: If the checkpoint is such a file, or a folder that FSDP2 wrote.
    """
    if is_checkpoint_folder(path):
        if all(keys[0] != "model" for keys in FileSystemReader(path).read_metadata().planner_data.values()):
            raise ValueError(f"'{path}' is from another strategy than fsdp: resume it under --trainer.strategy fsdp2")
        return
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError:
        return  # It holds more than plain values, and was not written by this program.
    for state in checkpoint.get("optimizer_states", ()):
        if not _numbered_like_the_model(state, list(checkpoint["state_dict"])):
            raise ValueError(
                f"'{path}' is from one device or DDP, and FSDPStrategy would give the optimizer's state to other"
                " parameters: resume it under --trainer.strategy fsdp2, or under ddp"
            )


def _numbered_like_the_model(state: dict[str, Any], weights: list[str]) -> bool:
    groups = state["param_groups"]
    if any("param_names" not in group for group in groups):
        return len(groups) == 1
    numbers = [number for group in groups for number in group["params"]]
    names = dict(zip(numbers, (name for group in groups for name in group["param_names"]), strict=True))
    places = [weights.index(name) for _, name in sorted(names.items()) if name in weights]
    return places == sorted(places)
