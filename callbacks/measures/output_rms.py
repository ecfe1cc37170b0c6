"""The RMS of layer outputs."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_muon.callbacks.shards import EACH_RANK, entry_norms, over_ranks
from lightning_muon.optim.routing.repeated import repeated_modules
from lightning_muon.optim.routing.wrapped_names import plain_name
from lightning_muon.optim.sharding.dtensor import local_tensor


class OutputMeter:
    """Measure modules, given by name, in the forward passes between :meth:`start` and :meth:`stop`.

    The last of several passes counts, and of several outputs the first floating-point tensor.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._handles: list[RemovableHandle] = []
        self._measured: dict[str, tuple[Tensor, int]] = {}  # norm and number of entries

    def start(self) -> None:
        """Register the hooks, unless they are registered."""
        if not self._handles:
            self._handles = [
                module.register_forward_hook(self._hook(name), always_call=False)
                for name, module in self.modules.items()
            ]

    def stop(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def rms(self, trainer: Trainer) -> dict[str, float]:
        """Return the root mean square over all ranks, by module. A collective of all ranks."""
        measured, self._measured = self._measured, {}
        norms, sizes = zip(*(measured.get(name, (torch.zeros(()), 0)) for name in self.modules), strict=True)
        stacked = torch.stack([norm.to(trainer.strategy.root_device) for norm in norms])
        found = over_ranks(trainer, [EACH_RANK] * len(self.modules), [stacked], sizes)
        values = (found.norm[0] / found.entries.sqrt()).tolist()
        return {name: rms for name, rms, size in zip(self.modules, values, found.entries, strict=True) if size}

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    local = local_tensor(tensor.detach())
                    self._measured[name] = entry_norms([local])[0], local.numel()
                    return

        return measure


def named_layers(module: LightningModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules inside a module, by names without wrappers; a wrapper stands for the module that it wraps."""
    seen = {""}
    for wrapped_name, layer in module.named_modules():
        name = plain_name(wrapped_name)
        if name not in seen:
            seen.add(name)
            yield name, layer


def block_names(module: nn.Module) -> list[str]:
    """Return the names of the blocks: the repeated modules of a model."""
    return [plain_name(name) for name, _ in repeated_modules(module, _may_be_block)]


def _may_be_block(module: nn.Module) -> bool:
    """Return whether a module has parameters, and is run: lists in a list are not."""
    return next(module.parameters(), None) is not None and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def compiled_names(module: LightningModule) -> set[str]:
    """Return the names of the modules whose hooks do not run, because ``torch.compile`` compiled them or a parent."""
    if getattr(module, "_compiler_ctx", None) is not None:  # torch.compile(module), which Lightning unwraps
        return {name for name, _ in named_layers(module)}
    compiled: set[str] = set()
    for name, layer in named_layers(module):
        parent = name.rpartition(".")[0]
        in_place = getattr(layer, "_compiled_call_impl", None) is not None
        if parent in compiled or in_place:
            compiled.add(name)
        elif isinstance(layer, OptimizedModule):
            compiled |= {inner for inner, _ in named_layers(module) if inner.startswith(f"{name}.")}
    return compiled
