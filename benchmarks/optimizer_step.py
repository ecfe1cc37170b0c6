"""Time and memory of a whole optimizer step: ``MuonAdamW``, torch's Muon beside AdamW, and other packages.

``python -m benchmarks.optimizer_step`` runs all in one process, in turns, and prints medians and ratios. The parameters
have the shapes of real models. The gradients are random.
"""

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floor import Rates, machine_rates
from benchmarks.peak_memory import peak_memory
from benchmarks.peers import PEERS, installed_peers, split
from benchmarks.record import REPOSITORY, RESULTS, report
from benchmarks.stopwatch import seconds
from lightning_muon.optim import MatrixLayout, MuonAdamW, Rule, route_parameters


class Model(nn.Module):
    """Layers, an embedding and a tied head: the parameters of a model, without a forward pass."""

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
    """Return the parameters of GPT-2: attention and MLP with biases, two norms per block."""
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layers = [nn.Linear(*shape) for _ in range(depth) for shape in block]
    return Model([*layers, *(nn.LayerNorm(width) for _ in range(2 * depth))], vocabulary, width)


def resnet50() -> nn.Module:
    """Return the convolutions of ResNet-50."""
    shapes, channels = [(64, 3, 7)], 64
    for inner, number in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(number):
            shapes += [(inner, channels, 1), (inner, inner, 3), (4 * inner, inner, 1)]
            shapes += [(4 * inner, channels, 1)] if index == 0 else []
            channels = 4 * inner
    return Model([nn.Conv2d(i, o, k, bias=False) for o, i, k in shapes], 1000, 2048)


def mixture(width: int = 256, depth: int = 8, number: int = 8) -> nn.Module:
    """Return attention layers, and experts stacked in one parameter."""
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
    "ours, Polar Express, 4 steps": {
        "orthogonalizer": "polar_express",
        "orthogonalizer_options": {"steps": 4, "lower_bound": 0.01},
    },
    "ours, fast (Polar Express, 3 steps)": {
        "orthogonalizer": "polar_express",
        "orthogonalizer_options": {"steps": 3, "lower_bound": 0.02},
    },
    "ours, gram": {"orthogonalizer": "gram_newton_schulz"},
    "ours, NorMuon": {"neuron_beta": 0.95},
    "ours, cautious": {"cautious_weight_decay": True},
    "ours, fixed norm": {"fixed_norm": 0.02},
    "ours, state in bfloat16": {"momentum_dtype": "bfloat16"},
    "ours, state in int8": {"momentum_dtype": "int8"},
    "ours, PolarGrad (QDWH)": {"orthogonalizer": "qdwh", "update_scale": "nuclear_norm", "nesterov": False},
    "ours, PolarGrad (QDWH), polar first": {
        "orthogonalizer": "qdwh",
        "update_scale": "nuclear_norm",
        "nesterov": False,
        "polar_first": True,
    },
}
REFERENCE = "torch Muon + AdamW"
HEAD = 64  # width of an attention head
# Optimizers whose FLOPs are products of bfloat16 where the device supports them. Only these have a floor.
MULTIPLIES_IN_BFLOAT16 = {
    REFERENCE,
    "ours",
    "ours, Polar Express, 4 steps",
    "ours, fast (Polar Express, 3 steps)",
    "ours, NorMuon",
    "ours, cautious",
}
# Repeat pairs of steps for this long: at least three pairs, at most ``--rounds``.
SECONDS = 20.0


@dataclass
class Contestant:
    """One or more optimizers on their own model."""

    optimizers: list[torch.optim.Optimizer]
    gradients: dict[nn.Parameter, Tensor]

    def prepare(self) -> None:
        """Set the gradients again: some optimizers remove them."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient

    def step(self) -> None:
        """Take one step with each optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def least_bytes(self) -> int:
        """Return the bytes that a step must read (gradients, state, weights) and write (state, weights)."""
        weights = sum(p.numel() * p.element_size() for p in self.gradients)
        return 3 * weights + 2 * self.state_bytes()

    def state_bytes(self) -> int:
        """Return the bytes of the optimizer state."""
        tensors = (
            t for o in self.optimizers for state in o.state.values() for t in state.values() if torch.is_tensor(t)
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def torch_muon(model: nn.Module, fused: bool | None = None) -> list[torch.optim.Optimizer]:
    """Return ``torch.optim.Muon`` for 2-D hidden matrices and AdamW for the rest, as its documentation shows.

    Args:
        model: The model.
        fused: Argument of AdamW.
    """
    hidden, rest = split(model)
    matrices = [p for p in hidden if p.ndim == 2]
    adamw = torch.optim.AdamW([*rest, *(p for p in hidden if p.ndim != 2)], fused=fused)
    return [*([torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")] if matrices else []), adamw]


def make_contestant(
    build: Callable[[], nn.Module], device: str, optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]
) -> Contestant:
    """Make a model, its optimizers and random gradients."""
    torch.manual_seed(0)
    model = build().to(device)
    return Contestant(optimizers(model), {p: torch.randn_like(p) for p in model.parameters()})


def contestants(
    build: Callable[[], nn.Module], device: str, peers: Iterable[str]
) -> Iterator[tuple[str, Callable[[], Contestant]]]:
    """Yield the name of each contestant and a function that makes it."""
    make = partial(make_contestant, build, device)
    yield REFERENCE, partial(make, torch_muon)
    yield "torch AdamW alone", partial(make, lambda model: [torch.optim.AdamW(model.parameters())])
    yield "torch AdamW alone, fused", partial(make, lambda model: [torch.optim.AdamW(model.parameters(), fused=True)])
    for name, options in PRESETS.items():
        yield name, partial(make, partial(_ours, options))
    by_role = {"head": 0.01}
    yield "ours, rates by role", partial(make, lambda model: [MuonAdamW(route_parameters(model, lr_by_role=by_role))])
    with torch.device("meta"):
        has_attention = any(isinstance(module, nn.Linear) for module in build().get_submodule("layers").children())
    if has_attention:
        yield "ours, per head", partial(make, _per_head)
    for name in peers:
        yield f"{name}, Muon", partial(make, PEERS[name])


def _ours(options: dict[str, Any], model: nn.Module) -> list[torch.optim.Optimizer]:
    return [MuonAdamW(route_parameters(model), **options)]


def _per_head(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Orthogonalize each head of the attention by itself: blocks of rows of q, k, v, and of columns of the output."""
    width = model.get_submodule("embedding").get_parameter("weight").shape[1]
    heads = max(1, width // HEAD)
    layouts = {
        (3 * width, width): MatrixLayout(blocks=3 * heads),
        (width, width): MatrixLayout(blocks=heads, along_inputs=True),
    }
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}
    rules = [Rule(name, "muon", layout=layouts[shape]) for name, shape in shapes.items() if shape in layouts]
    return [MuonAdamW(route_parameters(model, rules))]


def measure(build: Callable[[], nn.Module], device: str, rounds: int, peers: Iterable[str]) -> list[dict[str, Any]]:
    """Measure each contestant in turns with the reference.

    Only these two are in memory at a time. The ratio is the median over pairs of steps, so that other load on the
    machine affects both.
    """
    rates = machine_rates(device)
    made = dict(contestants(build, device, peers))
    reference = made[REFERENCE]()
    rows = []
    for name, maker in made.items():
        contestant = reference if name == REFERENCE else maker()
        measured = compare(contestant, reference, device, rounds)
        floor = floor_ms(contestant, rates) if name in MULTIPLIES_IN_BFLOAT16 else None
        rows.append({"optimizer": name, **measured, "floor ms": floor})
        del contestant
        gc.collect()
    return rows


def compare(
    contestant: Contestant, reference: Contestant, device: str, rounds: int, limit: float = SECONDS
) -> dict[str, Any]:
    """Measure a contestant in turns with the reference, for ``limit`` seconds at most, but at least three times."""
    contestant.prepare()
    contestant.step()
    contestant.prepare()
    peak = peak_memory(contestant.step, device)
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(pairs) < min(3, rounds) or (len(pairs) < rounds and time.perf_counter() - start < limit):
        pairs.append((_seconds(reference, device), _seconds(contestant, device)))
    return {
        "rounds": len(pairs),
        "ms": 1e3 * statistics.median(own for _, own in pairs),
        "times torch's speed": statistics.median(theirs / own for theirs, own in pairs),
        "state MB": contestant.state_bytes() / 2**20,
        "peak MB": None if peak is None else peak / 2**20,
    }


def floor_ms(contestant: Contestant, rates: Rates) -> float:
    """Return the floor of a step in milliseconds: products in bfloat16, and the least memory traffic."""
    contestant.prepare()
    return 1e3 * rates.floor(contestant.step, contestant.least_bytes())


def _seconds(contestant: Contestant, device: str) -> float:
    contestant.prepare()
    return seconds(contestant.step, device)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_step", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7, help="paired steps of each contestant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, to check that it runs")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="other packages (default: those installed)")
    parser.add_argument("--results", type=Path, help="folder for the JSON record")
    options = parser.parse_args(arguments)
    models = {"tiny": partial(gpt, 16, 1, 16)} if options.quick else {name: MODELS[name] for name in options.models}
    # --quick gives no valid results, so it must not replace the records.
    results = options.results or (REPOSITORY / "build" / "benchmarks" if options.quick else RESULTS)
    rounds = 1 if options.quick else options.rounds
    for model, build in models.items():
        rows = measure(
            build, options.device, rounds, peers=installed_peers() if options.peers is None else options.peers
        )
        name = "-".join(["optimizer_step", re.sub(r"\W+", "_", model.lower()), options.device])
        columns = ["optimizer", "ms", "times torch's speed", "floor ms", "state MB", "peak MB"]
        settings = {"rounds": rounds, "model": model, "quick": options.quick}
        report(f"{model}: one step", rows, columns, settings, name, results)


if __name__ == "__main__":
    main()
