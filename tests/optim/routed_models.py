"""Models for the tests of routing, and short forms of their routes."""

import torch
from torch import nn

from lightning_muon.optim import Rule, find_routes


def algorithms(model: nn.Module, rules: list[Rule] | None = None) -> dict[str, str]:
    return {route.name: route.algorithm for route in find_routes(model, rules or [])}


def muon(model: nn.Module, rules: list[Rule] | None = None) -> set[str]:
    return {name for name, algorithm in algorithms(model, rules).items() if algorithm == "muon"}


class Block(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)


class Transformer(nn.Module):
    def __init__(self, *, tied: bool = False, head: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.position = nn.Parameter(torch.zeros(10, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        if head:
            self.output = nn.Linear(8, 16, bias=False)
        if tied:
            self.output.weight = self.embedding.weight


HIDDEN = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("qkv", "up", "down")}


class Conv1D(nn.Module):
    """Like transformers.pytorch_utils.Conv1D: a linear layer stored (in, out)."""

    def __init__(self, fan_out: int, fan_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(fan_out))
