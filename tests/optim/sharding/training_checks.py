"""20 steps on the same batches: the weights are those of one device."""

from functools import cache

import torch
import torch.distributed as dist
from model import Block, make_model
from torch import Tensor
from ways import make_optimizer, train, whole, wrap

from lightning_muon.optim import Rule

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
