"""20 steps on the same batches: the weights are those of one device."""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from model import Block, make_model
from torch import Tensor, nn
from ways import make_optimizer, train, whole, wrap

from lightning_muon.optim import MatrixLayout, Rule

METHODS = ("newton_schulz", "polar_express", "gram_newton_schulz", "qdwh", "zolo_pd", "svd")
STEPS = 20
OPTIONS = {"lr": 0.005, "weight_decay": 0.1, "orthogonalizer_options": {"dtype": "float32"}}


def methods_by_turns() -> list[Rule]:
    """Every method on matrices of several kinds; that makes a parameter group for each."""
    layers = [name for name, p in make_model().blocks.named_parameters() if p.ndim > 1]
    return [
        Rule(f"*blocks.{name}", "muon", {"orthogonalizer": METHODS[number % len(METHODS)]})
        for number, name in enumerate(layers)
    ]


@cache
def one_device() -> dict[str, Tensor]:
    model = make_model()
    optimizer = make_optimizer(model, "one", rules=methods_by_turns(), **OPTIONS)
    assert {group["orthogonalizer"] for group in optimizer.param_groups} == set(METHODS)
    train(model, optimizer, STEPS)
    return whole(model)


def equals_one_device(way: str) -> None:
    model = wrap(way, make_model(), Block)
    optimizer = make_optimizer(model, way, rules=methods_by_turns(), **OPTIONS)
    train(model, optimizer, STEPS, dist.get_rank(), dist.get_world_size())
    expected, found = one_device(), whole(model)
    assert found.keys() == expected.keys()
    for name, before in make_model().named_parameters():
        if way == "fsdp1" and name.startswith("unused"):
            # FSDP1 gives it a gradient of zeros, so that it decays.
            decay = 1.0 if name.endswith("bias") else (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) ** STEPS
            torch.testing.assert_close(found[name], before * decay)
            continue
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        stays = name.startswith(("frozen", "unused"))
        assert torch.equal(found[name], before) == stays, name
    same_everywhere(found)


def same_everywhere(weights: dict[str, Tensor]) -> None:
    """Bit by bit: what drifts apart a little drifts apart more and more."""
    mine = torch.cat([w.flatten() for w in weights.values()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


def check_ddp() -> None:
    equals_one_device("ddp")


def check_ddp_with_sharded_state() -> None:
    equals_one_device("ddp_sharded_state")


def check_fsdp2() -> None:
    equals_one_device("fsdp2")


def check_hsdp() -> None:
    equals_one_device("hsdp")


check_hsdp.world_sizes = (4,)


def check_fsdp1() -> None:
    equals_one_device("fsdp1")


class Gated(nn.Module):
    """Matrices whose outputs can be closed: without gradient are then all of one, a third of one, or one of several."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.partly, self.closed, self.qkv = (nn.Linear(8, rows, bias=False) for rows in (6, 12, 12, 18))
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor, closes: bool) -> Tensor:
        gates = [torch.ones(rows) for rows in (6, 12, 12, 18, 3)]
        if closes:
            gates[1][:4], gates[2][:], gates[3][6:12], gates[4][1] = 0, 0, 0, 0
        found = [layer(x) for layer in (self.open, self.partly, self.closed, self.qkv)]
        found.append(torch.einsum("bi,eoi->boe", x, self.experts.up_proj))
        return torch.cat([(y * gate).flatten(1) for y, gate in zip(found, gates, strict=True)], dim=1)


GATED_RULES = [
    Rule("qkv.weight", "muon", layout=MatrixLayout(blocks=3)),
    Rule("experts.up_proj", "muon", layout=MatrixLayout(stacked=True)),
    Rule("*.weight", "muon"),
]
RESTING = {"closed.weight": slice(None), "qkv.weight": slice(6, 12), "experts.up_proj": 1}


def train_gated(way: str, **options: Any) -> list[dict[str, Tensor]]:
    """The weights after two steps with all gradients, after two without some, and after one more with all."""
    torch.manual_seed(0)
    model = Gated() if way == "one" else wrap(way, Gated(), nn.Linear)
    optimizer = make_optimizer(model, way, GATED_RULES, lr=0.01, weight_decay=0.0, **options)
    rank, world_size = (0, 1) if way == "one" else (dist.get_rank(), dist.get_world_size())
    generator = torch.Generator().manual_seed(1)
    seen = []
    for closes in (False, False, True, True, False):
        x, target = torch.randn(12, 8, generator=generator), torch.randn(12, 66, generator=generator)
        mine = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
        optimizer.zero_grad()
        (model(x[mine], closes) - target[mine]).square().mean().backward()
        optimizer.step()
        seen.append(whole(model))
    return [seen[1], seen[3], seen[4]]


def rests_like_one_device(way: str, **options: Any) -> None:
    """A matrix whose gradient is zero on one rank alone moves, on all ranks it rests."""
    options["orthogonalizer"] = "svd"
    expected, found = train_gated("one", **options), train_gated(way, **options)
    for name, resting in RESTING.items():
        assert torch.equal(found[1][name][resting], found[0][name][resting]), (way, options, name)
        assert not torch.equal(found[2][name][resting], found[1][name][resting]), (way, options, name)
    assert bool((found[1]["partly.weight"] != found[0]["partly.weight"]).all()), (way, options)
    # Where rounding differs, a code may: then a step differs by a code of each momentum.
    atol = 1e-5 if options.get("momentum_dtype") != "int8" else 2e-3
    for name, weights in found[2].items():
        torch.testing.assert_close(
            weights, expected[2][name], atol=atol, rtol=0, msg=lambda m, n=name: f"{way}, {n}: {m}"
        )


def check_matrices_without_gradient_rest() -> None:
    for way in ("ddp", "ddp_sharded_state", "fsdp2", "fsdp1"):
        rests_like_one_device(way)
        rests_like_one_device(way, polar_first=True, neuron_beta=0.9, fixed_norm=0.5)
    rests_like_one_device("fsdp2", momentum_dtype="int8")
    rests_like_one_device("ddp_sharded_state", momentum_dtype="int8")


check_matrices_without_gradient_rest.world_sizes = (2, 3, 4)


def check_matrices_without_gradient_rest_under_hsdp() -> None:
    rests_like_one_device("hsdp")


check_matrices_without_gradient_rest_under_hsdp.world_sizes = (4,)
