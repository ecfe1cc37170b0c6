"""All options that take part in the exchange, together and in turns; hooks; gradients that are not there."""

from typing import Any

import torch
import torch.distributed as dist
from model import BLOCKS, Block, make_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from ways import make_optimizer, train, whole, wrap

from lightning_muon.optim import Rule

WAYS = ("ddp", "ddp_sharded_state", "fsdp2", "fsdp1")
STEPS = 3


def equals_one_device(atol: float = 1e-5, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    options = {**options, "orthogonalizer_options": {"dtype": dtype}}
    one = make_model(dtype)
    train(one, make_optimizer(one, "one", **options), STEPS)
    expected = whole(one)
    for way in WAYS:
        model = wrap(way, make_model(dtype), Block)
        train(model, make_optimizer(model, way, **options), STEPS, dist.get_rank(), dist.get_world_size())
        for name, found in whole(model).items():
            if not name.startswith("unused"):
                torch.testing.assert_close(
                    found, expected[name], atol=atol, rtol=0, msg=lambda m, n=name, w=way: f"{w}, {n}: {m}"
                )


def check_polargrad_with_factors_first_in_many_buckets() -> None:
    equals_one_device(lr=0.1, update_scale="nuclear_norm", polar_first=True, batch_elements=200)


def check_normuon_with_cautious_decay() -> None:
    equals_one_device(lr=0.01, neuron_beta=0.9, cautious_weight_decay=True)


def check_everything_at_once() -> None:
    equals_one_device(
        lr=0.1,
        neuron_beta=0.9,
        update_scale="nuclear_norm",
        polar_first=True,
        cautious_weight_decay=True,
        nesterov=False,
        batch_elements=1,
    )


def check_blocks_of_several_shapes() -> None:
    equals_one_device(rules=BLOCKS, lr=0.01, neuron_beta=0.9, update_scale="mup", batch_elements=200)
    equals_one_device(rules=BLOCKS, lr=0.1, neuron_beta=0.9, update_scale="nuclear_norm", polar_first=True)


def check_float64_travels_as_such() -> None:
    equals_one_device(atol=1e-9, dtype=torch.float64, lr=0.01, update_scale="nuclear_norm")


def check_bfloat16_on_the_wire_rounds_alike_on_all_ranks() -> None:
    """Two digits, not more; but the copies of DDP stay equal bit by bit."""
    options = {"lr": 0.01, "communication_dtype": "bfloat16", "update_scale": "nuclear_norm"}
    equals_one_device(atol=5e-3, **options)
    model = wrap("ddp", make_model(), Block)
    train(model, make_optimizer(model, "ddp", **options), STEPS, dist.get_rank(), dist.get_world_size())
    mine = torch.cat([w.flatten() for w in whole(model).values()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


def check_each_matrix_is_heard_of_once() -> None:
    """By the hooks, on its owner, with the polar factor that one device finds."""
    expected = sorted(_heard("one"))
    for way in WAYS:
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, _heard(way))
        assert all(everywhere), way  # nobody is idle
        together = sorted(pair for heard in everywhere for pair in heard if not pair[0].startswith("unused"))
        assert [name for name, _ in together] == [name for name, _ in expected], way
        for (name, norm), (_, reference) in zip(together, expected, strict=True):
            assert abs(norm - reference) < 1e-3, (way, name)


def _heard(way: str) -> list[tuple[str, float]]:
    """The name and the norm of each polar factor of the first step."""
    model = make_model() if way == "one" else wrap(way, make_model(), Block)
    optimizer = make_optimizer(model, way, orthogonalizer_options={"dtype": "float32"})
    heard: list[tuple[str, float]] = []

    def hear(names: list[str], factors: Tensor) -> None:
        heard.extend((name, float(f.norm())) for name, f in zip(names, factors, strict=True))

    optimizer.register_orthogonalize_hook(hear)
    here = (0, 1) if way == "one" else (dist.get_rank(), dist.get_world_size())
    train(model, optimizer, 1, *here)
    assert "unused.weight" not in dict(heard) or way.startswith("fsdp")
    return heard


def check_a_rank_without_gradient_keeps_nobody_waiting() -> None:
    """As when its experts got no token: the others step on, with what it has taken for zero."""
    model = wrap("fsdp2", make_model(), Block)
    optimizer = make_optimizer(model, "fsdp2")
    train(model, optimizer, 1, dist.get_rank(), dist.get_world_size())
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    if dist.get_rank() == 0:
        optimizer.zero_grad()
    optimizer.step()
    for name, parameter in model.named_parameters():
        mine = parameter.to_local()
        stays = dist.get_rank() == 0 or name.startswith("frozen") or mine.numel() == 0
        assert torch.equal(mine, before[name]) == stays, name
        assert mine.isfinite().all()


def check_no_gradient_anywhere_changes_nothing() -> None:
    for way in WAYS:
        model = wrap(way, make_model(), Block)
        make_optimizer(model, way).step()
        for name, found in whole(model).items():
            assert torch.equal(found, make_model().get_parameter(name)), (way, name)


def check_matrices_of_one_row_and_of_one_column() -> None:
    """Of which most ranks have nothing; torch's Muon fails on [1, N] under FSDP2."""
    rules = [Rule("*", "muon")]
    options = {"lr": 0.1, "neuron_beta": 0.9, "orthogonalizer_options": {"dtype": "float32"}}
    found: dict[str, list[Tensor]] = {}
    for way in ("one", *WAYS):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((7, 1), (1, 9), (9, 1))))
        model = model if way == "one" else wrap(way, model, nn.Linear)
        optimizer = make_optimizer(model, way, rules, **options)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.ones(4, 7)).sum().backward()
            optimizer.step()
        found[way] = list(whole(model).values())
        for matrix, expected in zip(found[way], found["one"], strict=True):
            torch.testing.assert_close(matrix, expected, atol=1e-5, rtol=0, msg=lambda m, w=way: f"{w}: {m}")


def check_zero_gradients_at_lr_zero_change_nothing() -> None:
    """What distributed checkpointing does to have a state to load into."""
    for way in ("ddp", "ddp_sharded_state", "fsdp2"):
        model = wrap(way, make_model(), Block)
        optimizer = make_optimizer(model, way, lr=0.0, neuron_beta=0.9)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, found in whole(model).items():
            assert torch.equal(found, make_model().get_parameter(name)), (way, name)
        for state in optimizer.state.values():
            # This rank's part: to compare DTensors, torch first works out how they are sharded, at length.
            parts = (v.to_local() if isinstance(v, DTensor) else v for k, v in state.items() if k != "step")
            assert not any(bool(part.any()) for part in parts)
