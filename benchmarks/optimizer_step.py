"""The time of a whole optimizer step: ours, torch's two optimizers side by side, and peers.

``python -m benchmarks.optimizer_step`` runs all in one process, in turns, and prints medians and ratios. The parameter
sets have the shapes of real models; gradients are random.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import RESULTS, report
from lightning_muon.optim import MuonAdamW, route_parameters


class Model(nn.Module):
    """Matrices, vectors and an embedding of given shapes: all that a step sees of a model."""

    def __init__(self, layers: list[nn.Module], vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight


class Experts(nn.Module):
    """The matrices of a mixture of experts."""

    def __init__(self, number: int, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(number, hidden, width))
        self.down_proj = nn.Parameter(torch.randn(number, width, hidden))


def gpt(width: int, depth: int, vocabulary: int) -> nn.Module:
    """GPT-2's parameters: attention and MLP with biases, two norms a block."""
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layers = [nn.Linear(*shape) for _ in range(depth) for shape in block]
    return Model([*layers, *(nn.LayerNorm(width) for _ in range(2 * depth))], vocabulary, width)


def resnet50() -> nn.Module:
    """The convolutions of ResNet-50, as (out, in, kernel)."""
    shapes, channels = [(64, 3, 7)], 64
    for inner, number in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(number):
            shapes += [(inner, channels, 1), (inner, inner, 3), (4 * inner, inner, 1)]
            shapes += [(4 * inner, channels, 1)] if index == 0 else []
            channels = 4 * inner
    return Model([nn.Conv2d(i, o, k, bias=False) for o, i, k in shapes], 1000, 2048)


def mixture(width: int = 256, depth: int = 8, number: int = 8) -> nn.Module:
    """Attention, and experts stacked in one parameter."""
    attention = [nn.Linear(width, size, bias=False) for _ in range(depth) for size in (3 * width, width)]
    return Model([*attention, *(Experts(number, width, 2 * width) for _ in range(depth))], 8192, width)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2 small": partial(gpt, 768, 12, 50257),
    "GPT, 24 × 256": partial(gpt, 256, 24, 256),
    "ResNet-50": resnet50,
    "MoE, 8 × 8 experts": mixture,
}

PRESETS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, polar express 4": {
        "orthogonalizer": "polar_express",
        "orthogonalizer_options": {"steps": 4, "lower_bound": 0.01},
    },
    "ours, gram": {"orthogonalizer": "gram_newton_schulz"},
    "ours, NorMuon": {"neuron_beta": 0.95},
    "ours, cautious": {"cautious_weight_decay": True},
    "ours, PolarGrad (QDWH)": {"orthogonalizer": "qdwh", "update_scale": "nuclear_norm", "nesterov": False},
}
REFERENCE = "torch Muon + AdamW"


@dataclass
class Contestant:
    """An optimizer, or several, on a model of their own."""

    optimizers: list[torch.optim.Optimizer]
    model: nn.Module

    def step(self) -> None:
        """Take one step with all of them."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_bytes(self) -> int:
        """Return what their state takes."""
        tensors = (
            t for o in self.optimizers for state in o.state.values() for t in state.values() if torch.is_tensor(t)
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def torch_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return ``torch.optim.Muon`` for hidden matrices of two dimensions beside AdamW, as its documentation does."""
    groups = route_parameters(model)
    parameters = [(p, g["algorithm"] == "muon" and p.ndim == 2) for g in groups for p in g["params"]]
    rest = torch.optim.AdamW([p for p, fits in parameters if not fits])
    matrices = [p for p, fits in parameters if fits]
    return [*([torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")] if matrices else []), rest]


def contestants(build: Callable[[], nn.Module], device: str) -> Iterator[tuple[str, Callable[[], Contestant]]]:
    """Yield each contestant's name, and how to make it."""

    def make(optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> Contestant:
        torch.manual_seed(0)
        model = build().to(device)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return Contestant(optimizers(model), model)

    yield REFERENCE, partial(make, torch_muon)
    yield "torch AdamW alone", partial(make, lambda model: [torch.optim.AdamW(model.parameters())])
    for name, options in PRESETS.items():
        yield name, partial(make, partial(_ours, options))


def _ours(options: dict[str, Any], model: nn.Module) -> list[torch.optim.Optimizer]:
    return [MuonAdamW(route_parameters(model), **options)]


def measure(build: Callable[[], nn.Module], device: str, rounds: int) -> list[dict[str, Any]]:
    """Time each contestant against the reference, turn by turn.

    Two stand in memory at a time. The ratio is the median over pairs of steps, so that what else the machine does
    falls on both.
    """
    made = dict(contestants(build, device))
    reference = made[REFERENCE]()
    rows = []
    for name, maker in made.items():
        contestant = reference if name == REFERENCE else maker()
        contestant.step()
        pairs = [(_seconds(reference, device), _seconds(contestant, device)) for _ in range(rounds)]
        rows.append(
            {
                "optimizer": name,
                "ms": 1e3 * statistics.median(own for _, own in pairs),
                "times torch's speed": statistics.median(theirs / own for theirs, own in pairs),
                "state MB": contestant.state_bytes() / 2**20,
            }
        )
        del contestant
        gc.collect()
    return rows


def _seconds(contestant: Contestant, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    contestant.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7, help="paired steps of each contestant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON record")
    arguments = parser.parse_args()
    for model in arguments.models:
        rows = measure(MODELS[model], arguments.device, arguments.rounds)
        name = "optimizer_step-" + "".join(c if c.isalnum() else "_" for c in model.lower()) + f"-{arguments.device}"
        columns = ["optimizer", "ms", "times torch's speed", "state MB"]
        report(f"{model}: one step", rows, columns, {"rounds": arguments.rounds, "model": model}, name)


if __name__ == "__main__":
    main()
