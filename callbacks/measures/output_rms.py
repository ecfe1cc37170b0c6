"""How large the outputs of layers are."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_muon.callbacks.muon_matrices import WRAPPERS, entry_norms
from lightning_muon.callbacks.shards import Shard, over_ranks

_WRAPPERS = re.compile("|".join(re.escape(wrapper) for wrapper in WRAPPERS))


class OutputListener:
    """Measure the outputs of modules in forward passes, from :meth:`start` to :meth:`stop`.

    Of several passes the last one counts, and of several outputs the first tensor of floating point.

    Args:
        modules: By their names.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._handles: list[RemovableHandle] = []
        self._norms: dict[str, tuple[Tensor, int]] = {}

    def start(self) -> None:
        """Listen, unless it does already."""
        if not self._handles:
            self._handles = [
                module.register_forward_hook(self._measure(name), always_call=False)
                for name, module in self.modules.items()
            ]

    def stop(self) -> None:
        """Listen no more."""
        while self._handles:
            self._handles.pop().remove()

    def rms(self, trainer: Trainer) -> dict[str, float]:
        """Return the root mean square over what all ranks have heard, by module. A collective of all ranks."""
        heard, self._norms = self._norms, {}
        nothing = torch.zeros(()), 0
        norms, sizes = zip(*(heard.get(name, nothing) for name in self.modules), strict=True)
        device = trainer.strategy.root_device
        of_all = Shard(torch.empty(0), (None,))  # each rank has outputs of its own
        measured = [torch.stack([norm.to(device) for norm in norms]), torch.tensor(sizes, dtype=torch.float32)]
        found = over_ranks(trainer, [of_all] * len(self.modules), measured)
        values = (found.norm[0] / found.sum[1].sqrt()).tolist()
        return {name: rms for name, rms, size in zip(self.modules, values, found.sum[1].tolist(), strict=True) if size}

    def _measure(self, name: str) -> Any:
        @torch.no_grad()
        def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
                    self._norms[name] = entry_norms([local])[0], local.numel()
                    return

        return measure


def named_layers(module: LightningModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules inside one, by names without the prefixes of wrappers; a wrapper stands for its content."""
    seen = {""}
    for wrapped_name, layer in module.named_modules():
        name = _WRAPPERS.sub("", f"{wrapped_name}.").removesuffix(".")
        if name not in seen:
            seen.add(name)
            yield name, layer


def compiled_names(module: LightningModule) -> set[str]:
    """Return the names of the modules that ``torch.compile`` made part of a larger whole, where no hook is heard."""
    compiled: set[str] = set()
    if getattr(module, "_compiler_ctx", None) is not None:  # torch.compile(module), which Lightning unwraps
        return {name for name, _ in named_layers(module)}
    for name, layer in named_layers(module):
        parent = name.rpartition(".")[0]
        in_place = getattr(layer, "_compiled_call_impl", None) is not None
        if parent in compiled or in_place:
            compiled.add(name)
        elif isinstance(layer, OptimizedModule):
            compiled |= {inner for inner, _ in named_layers(module) if inner.startswith(f"{name}.")}
    return compiled
