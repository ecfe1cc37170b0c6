"""Tensor parallelism, with and without FSDP2 around it: shards that are no ranges of rows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_muon.optim import MatrixLayout, MuonAdamW, Rule, route_parameters

FLOAT32 = {"dtype": "float32"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12), nn.Linear(12, 12), nn.Linear(12, 5))


def parallel_network(sharded_too: bool) -> nn.Sequential:
    model = network()
    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if sharded_too:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
    else:
        parallelize_module(model, init_device_mesh("cpu", (4,)), plan)
    return model


def equals_one_device(sharded_too: bool, rules: Sequence[Rule] = (), **options: Any) -> None:
    models = network(), parallel_network(sharded_too)
    options = {"lr": 0.01, "orthogonalizer_options": FLOAT32, **options}
    optimizers = [MuonAdamW(route_parameters(m, rules), **options) for m in models]
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        inputs = torch.randn(24, 12, generator=generator)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    for (name, expected), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        whole = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def check_tensor_parallel() -> None:
    equals_one_device(sharded_too=False)


def check_tensor_parallel_with_fsdp2() -> None:
    equals_one_device(sharded_too=True)


def check_options() -> None:
    options = {"update_scale": "nuclear_norm", "polar_first": True, "cautious_weight_decay": True}
    equals_one_device(sharded_too=True, **options)


def check_blocks_of_several_shapes() -> None:
    rules = [
        Rule("0.weight", "muon", layout=MatrixLayout(split_sizes=(5, 3, 2), interleaved=2)),
        Rule("2.weight", "muon", layout=MatrixLayout(split_sizes=(12, 8), along_inputs=True)),
    ]
    for sharded_too in (False, True):
        equals_one_device(sharded_too, rules)
        equals_one_device(sharded_too, rules, update_scale="nuclear_norm", polar_first=True)


def check_matrices_without_gradient_rest() -> None:
    """All of it, one block of two, and none where only one rank's part of the gradient is zero."""
    rules = [Rule("2.weight", "muon", layout=MatrixLayout(blocks=2))]
    for options in ({}, {"polar_first": True}, {"polar_first": True, "update_scale": "nuclear_norm"}):
        models = network(), parallel_network(sharded_too=False)
        optimizers = [
            MuonAdamW(route_parameters(m, rules), lr=0.01, weight_decay=0.0, orthogonalizer_options=FLOAT32, **options)
            for m in models
        ]
        seen: list[list[torch.Tensor]] = []
        for zeros in ((), (slice(None),), (slice(6), slice(None)), (slice(None), slice(5)), ()):
            inputs = torch.randn(24, 12, generator=torch.Generator().manual_seed(len(seen)))
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                gradient = model[2].weight.grad
                if zeros and model is models[0]:
                    gradient[zeros] = 0
                elif len(zeros) == 2 and zeros[1] == slice(5):  # what the first rank has
                    gradient.to_local().mul_(float(dist.get_rank() != 0))
                elif zeros:
                    gradient.to_local()[zeros[0]] = 0
                optimizer.step()
            found = models[1][2].weight.full_tensor().detach().clone()
            torch.testing.assert_close(found, models[0][2].weight.detach(), atol=1e-5, rtol=0)
            seen.append([found[:6], found[6:]])
        moved = [[not torch.equal(*pair) for pair in zip(*both, strict=True)] for both in pairwise(seen)]
        assert moved == [[False, False], [False, True], [True, True], [True, True]]


def check_normuon_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"2\.weight is placed as .*neuron_beta"):
        MuonAdamW(route_parameters(parallel_network(sharded_too=False)), neuron_beta=0.9)
