"""Additions to Lightning's ``FSDPStrategy`` (FSDP1): blocks of any model, clipping by norm, a check before resuming."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.strategies.blocks import find_blocks
from lightning_muon.strategies.checkpoint_folder import check_plain, find_whole_together
from lightning_muon.strategies.folder_writer import write_folder
from lightning_muon.strategies.integrity import is_checkpoint_folder
from lightning_muon.strategies.metadata import read_metadata


class BlockWrapPolicy(ModuleWrapPolicy):
    """Wrap the blocks that ``FSDP2Strategy`` shards: ``FSDPStrategy(auto_wrap_policy=BlockWrapPolicy())``.

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
    """Clip by norm through the wrapped model; Lightning's ``FSDPPrecision`` does not have it, and refuses.

    Args:
        precision: As in ``Trainer(precision=…)``.
        strategy: Its ``model`` computes the norm over the shards of all ranks, and clips all parameters together.
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
    """Make ``Trainer(gradient_clip_val=…)`` work under this strategy, unless it has a precision plugin of its own."""
    if type(strategy.precision_plugin) is FSDPPrecision:
        strategy.precision_plugin = ClippingFSDPPrecision(strategy.precision_plugin.precision, strategy)


def protect_checkpoints(strategy: FSDPStrategy) -> None:
    """Make the sharded checkpoints of this strategy as safe as those of ``FSDP2Strategy``.

    Lightning writes them in place, where a kill leaves a mix of two saves, and runs code that they contain. After this
    call they are written to a sibling folder that takes the final name when it is complete. Folders and files are
    checked before they are loaded.
    """
    save, load, teardown = strategy.save_checkpoint, strategy.load_checkpoint, strategy.teardown

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None) -> None:
        if strategy._state_dict_type != "sharded" or storage_options is not None:
            save(checkpoint, filepath, storage_options)
            return
        states = checkpoint.get("optimizer_states", [])
        tensors = {"model": checkpoint["state_dict"], **{f"optimizer_{i}": state for i, state in enumerate(states)}}
        rest = {key: value for key, value in checkpoint.items() if key not in {"state_dict", "optimizer_states"}}
        write_folder(Path(strategy.broadcast(str(filepath))), tensors, rest)

    def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(strategy.broadcast(str(checkpoint_path)))
        find_whole_together(path)
        if path.exists() and weights_only is not False:
            check_plain(path)  # Lightning would run code that it contains
        return load(path, weights_only)

    def end() -> None:
        try:
            strategy.checkpoint_io.teardown()  # a file may be on its way in the background
        finally:
            teardown()

    strategy.teardown = end  # type: ignore[method-assign]
    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]


def check_resumable(path: Path) -> None:
    """Check that ``FSDPStrategy`` can resume training from a checkpoint without mixing up the optimizer's state.

    ``FSDPStrategy`` reads the parameter numbers in the optimizer's state as positions in ``model.parameters()``. In a
    file from one device or DDP they count through the parameter groups instead. State would then go to the wrong
    parameters, without an error if the shapes agree.

    Raises:
        ValueError: If the checkpoint is such a file, or a folder that FSDP2 wrote.
    """
    if is_checkpoint_folder(path):
        if all(keys[0] != "model" for keys in read_metadata(path).planner_data.values()):
            raise ValueError(f"'{path}' is from another strategy than fsdp: resume it under --trainer.strategy fsdp2")
        return
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError:
        return  # It contains more than plain values, so it is not from this program.
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
