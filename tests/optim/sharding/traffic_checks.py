"""How much travels, and how often: counted where torch.distributed is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from ways import make_optimizer, wrap

from lightning_muon.optim import Rule

WIDTH, LAYERS = 16, 8
ELEMENTS = LAYERS * WIDTH * WIDTH
BFLOAT16 = {"communication_dtype": "bfloat16"}


@dataclass
class Traffic:
    sent: int = 0
    calls: list[str] = field(default_factory=list)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the bytes that this rank sends to others, and its collectives."""
    traffic = Traffic()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    all_to_all, all_gather, all_reduce = dist.all_to_all_single, dist.all_gather_into_tensor, dist.all_reduce

    def counted_all_to_all(output: Tensor, packed: Tensor, incoming: Any, outgoing: Any, **options: Any) -> Any:
        traffic.calls.append("all_to_all")
        traffic.sent += (sum(outgoing) - outgoing[rank]) * packed.element_size()
        return all_to_all(output, packed, incoming, outgoing, **options)

    def counted_all_gather(output: Tensor, packed: Tensor, **options: Any) -> Any:
        traffic.calls.append("all_gather")
        traffic.sent += (world_size - 1) * packed.nbytes
        return all_gather(output, packed, **options)

    def counted_all_reduce(tensor: Tensor, **options: Any) -> Any:
        traffic.calls.append("all_reduce")
        return all_reduce(tensor, **options)

    with (
        patch.object(dist, "all_to_all_single", counted_all_to_all),
        patch.object(dist, "all_gather_into_tensor", counted_all_gather),
        patch.object(dist, "all_reduce", counted_all_reduce),
    ):
        yield traffic


def square_layers() -> nn.Module:
    """Matrices that all ranks can share evenly, and whose rows divide."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)), nn.Linear(WIDTH, 2, bias=False))


def step(way: str, model: nn.Module | None = None, groups: int | None = None, **options: Any) -> Traffic:
    """The traffic of the second step of the optimizer alone, which has so many parameter groups."""
    model = wrap(way, model or square_layers(), nn.Linear)
    optimizer = make_optimizer(model, way, orthogonalizer_options={"dtype": "float32"}, **options)
    assert groups in {None, len(optimizer.param_groups)}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with counted() as traffic:
        optimizer.step()
    return traffic


def check_sharded_matrices_travel_once_to_their_owner_and_back() -> None:
    world_size = dist.get_world_size()
    for way in ("fsdp2", "fsdp1"):
        traffic = step(way, **BFLOAT16)
        assert traffic.calls == ["all_to_all", "all_to_all"], way
        flags = 2 * LAYERS * (world_size - 1) // world_size  # whether the gradient of a piece is zero, one element each
        assert traffic.sent == 4 * ELEMENTS * (world_size - 1) // world_size**2 + flags, way
    assert step("fsdp2").sent == 2 * step("fsdp2", **BFLOAT16).sent  # float32, where the orthogonalizer computes in it


def check_replicated_matrices_only_come_from_their_owners() -> None:
    world_size = dist.get_world_size()
    traffic = step("ddp", **BFLOAT16)
    assert traffic.calls == ["all_to_all"]
    assert traffic.sent == 2 * ELEMENTS * (world_size - 1) // world_size
    sharded_state = step("ddp_sharded_state", **BFLOAT16)
    assert sharded_state.calls == ["all_to_all", "all_gather"]
    head = 2 * WIDTH // world_size * 4 * (world_size - 1)  # of AdamW, in the dtype of its weights
    assert sharded_state.sent == traffic.sent + head


def check_experts_that_are_whole_somewhere_stay_there() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 8, 16))
            self.down_proj = nn.Parameter(torch.randn(4, 16, 8))

    model = nn.Module()
    model.experts = Experts()
    options = {"neuron_beta": 0.9, "update_scale": "nuclear_norm", "polar_first": True}
    assert step("fsdp2", model, **options).calls == []


def check_collectives_a_bucket() -> None:
    buckets = LAYERS // dist.get_world_size()
    small = {"batch_elements": WIDTH * WIDTH}
    assert step("fsdp2", **small).calls == ["all_to_all"] * 2 * buckets
    norms = step("fsdp2", **small, neuron_beta=0.9)
    assert sorted(norms.calls) == sorted([*["all_to_all"] * 2, "all_reduce"] * buckets)


def check_heads_travel_with_their_projections() -> None:
    """As often, as much: a head is no message of its own."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    for way in ("fsdp2", "fsdp1", "ddp", "ddp_sharded_state"):
        for options in ({}, {"neuron_beta": 0.9}):
            whole, by_head = (
                step(way, nn.Sequential(*(Attention() for _ in range(LAYERS))), per_head=per_head, **options)
                for per_head in (False, True)
            )
            assert by_head.calls == whole.calls, (way, options)


def check_more_groups_take_no_more_collectives() -> None:
    """With their own learning rate, weight decay, momentum or betas; nor do numbers of neurons or of matrices."""
    one = [Rule("[01].weight", "adamw")]
    many = [
        Rule("0.weight", "adamw", {"lr": 0.1}),
        Rule("1.weight", "adamw", {"betas": (0.8, 0.9), "weight_decay": 0.0}),
        Rule("2.weight", "muon", {"lr": 0.1}),
        Rule("3.weight", "muon", {"momentum": 0.5, "weight_decay": 0.3}),
    ]
    for options in ({}, {"neuron_beta": 0.9, "fixed_norm": 0.01}, {"polar_first": True}):
        if "neuron_beta" in options:
            many.append(Rule("4.weight", "muon", {"neuron_beta": 0.5, "fixed_norm": 0.1}))
        for way in ("fsdp2", "fsdp1", "ddp", "ddp_sharded_state"):
            calls = step(way, rules=one, groups=3, **options).calls
            assert step(way, rules=many, groups=len(many) + 2, **options).calls == calls, (way, options)
        many = many[:4]


def check_resting_matrices_take_no_collective_of_their_own() -> None:
    """What says that a gradient is zero travels along with the pieces."""
    for options in ({}, {"polar_first": True}, {"update_scale": "nuclear_norm"}):
        assert step("fsdp2", **options).calls == ["all_to_all"] * 2
        assert step("ddp", **options).calls == ["all_to_all"]


def check_the_next_bucket_is_on_its_way_before_this_one_is_orthogonalized() -> None:
    order: list[str] = []
    model = wrap("fsdp2", square_layers(), nn.Linear)
    optimizer = make_optimizer(model, "fsdp2", batch_elements=WIDTH * WIDTH)
    optimizer.register_orthogonalize_hook(lambda *_: order.append("orthogonalize"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with counted() as traffic:
        traffic.calls = order
        optimizer.step()
    assert order[:4] == ["all_to_all", "all_to_all", "orthogonalize", "all_to_all"]
