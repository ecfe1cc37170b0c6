"""The GPT that is trained, and the optimizers of ``configs/``, both read from their files."""

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from benchmarks.gpu.measuring import SkippedError
from benchmarks.record import REPOSITORY
from lightning_muon.optim import MuonAdamW, route_parameters

CONFIGS = REPOSITORY / "configs"
TEMPLATE = REPOSITORY / "template" / "{{cookiecutter.__folder}}" / "tasks" / "text" / "src"

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Size(NamedTuple):
    """The size of a GPT and of its batches.

    Args:
        dim: Width.
        depth: Blocks.
        heads: Attention heads.
        context: Tokens of a sequence.
        vocabulary: Number of tokens.
        sequences: Sequences of a step.
        tied: Whether embedding and output head share their weight.
    """

    dim: int
    depth: int
    heads: int
    context: int
    vocabulary: int
    sequences: int
    tied: bool = True

    def micro_batch(self, memory: float) -> int:
        """Return the sequences of a forward pass that fit into ``memory`` GiB; 16 of GPT-2 small need about 35."""
        return min(self.sequences, 16 if memory > 60 else 8 if memory > 30 else 4)


# GPT-2 small (Radford et al., 2019), 124 million parameters, its vocabulary rounded up to a multiple of 64.
GPT2_SMALL = Size(dim=768, depth=12, heads=12, context=1024, vocabulary=50304, sequences=64)
TINY = Size(dim=32, depth=2, heads=2, context=16, vocabulary=64, sequences=8)


def make_gpt(size: Size) -> nn.Module:
    """Return the GPT of the generated project."""
    torch.manual_seed(0)
    gpt: nn.Module = _template().GPT(
        size.vocabulary, size.dim, size.depth, size.heads, context=size.context, tied_embeddings=size.tied
    )
    return gpt


def _template() -> Any:
    """Import the template's file with the model; it and what it imports contain no Jinja."""
    name = "text_of_the_template"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(TEMPLATE)]
        sys.modules[name] = package  # torch.compile looks for the classes there
    return import_module(f"{name}.model")


def make_tokens(size: Size, batches: int, sequences: int, device: str = "cpu") -> list[Tensor]:
    """Return batches of random tokens, each (sequences, context + 1)."""
    generator = torch.Generator().manual_seed(1)
    shape = (batches, sequences, size.context + 1)
    return list(torch.randint(size.vocabulary, shape, generator=generator).to(device))


class NextToken(nn.Module):
    """A GPT with its loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the cross-entropy of the next token, a scalar, for tokens (batch, time + 1)."""
        logits = self.net(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def read_config(name: str) -> dict[str, Any]:
    """Return a file of ``configs/``, such as ``"optimizer/fast"``."""
    content: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return content


def configured(entry: Any, *arguments: Any) -> Any:
    """Make what a ``class_path`` with ``init_args`` describes; other values are returned as they are."""
    if not isinstance(entry, Mapping) or "class_path" not in entry:
        return entry
    options = {key: configured(value) for key, value in entry.get("init_args", {}).items()}
    return imported(entry["class_path"])(*arguments, **options)


def imported(path: str) -> Any:
    """Return what has an import path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def preset(name: str) -> MakeOptimizer:
    """Return a function that makes the optimizer of a file of ``configs/optimizer/``.

    Raises:
        SkippedError: If the file sets more than the optimizer.
    """
    content = read_config(f"optimizer/{name}")
    if list(content) != ["model"] or list(content["model"]) != ["optimizer"]:
        raise SkippedError(f"configs/optimizer/{name}.yaml sets more than model.optimizer")
    entry = content["model"]["optimizer"]
    return lambda model: configured(entry, route_parameters(model))


def preset_names() -> list[str]:
    """Return the names of the files of ``configs/optimizer/``."""
    return sorted(path.stem for path in Path(CONFIGS, "optimizer").glob("*.yaml"))


def muon_adamw(**options: Any) -> MakeOptimizer:
    """Return a function that makes ``MuonAdamW``."""
    return lambda model: MuonAdamW(route_parameters(model), **options)


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Make ``torch.optim.AdamW`` with its fused kernel, and the betas of MuonAdamW."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def state_dtypes() -> dict[str, MakeOptimizer]:
    """Return ``MuonAdamW`` with its state in fewer bytes, if it has that option."""
    if "momentum_dtype" not in inspect.signature(MuonAdamW).parameters:
        return {}
    return {f"MuonAdamW, {dtype} momentum": muon_adamw(momentum_dtype=dtype) for dtype in ("bfloat16", "int8")}


def state_megabytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the size of the tensors of an optimizer's state."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in tensors) / 2**20
