"""The other optimizers of configs/optimizer, for comparisons: their update, groups, and state in checkpoints."""

import copy
import io
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_muon.optim import route_parameters

CONFIGS = Path(__file__).parents[2] / "configs" / "optimizer"
STEPS = 17


def make(preset: str, groups: Any, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of a preset, with some options changed."""
    entry = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())["model"]["optimizer"]
    module, _, name = entry["class_path"].rpartition(".")
    made: torch.optim.Optimizer = getattr(import_module(module), name)(groups, **{**entry["init_args"], **options})
    return made


def trained(preset: str, gradients: list[Tensor], **options: Any) -> Tensor:
    """A matrix of ones after steps with these gradients."""
    weight = nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = make(preset, [{"params": [weight], "algorithm": "muon", "role": "matrix"}], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def gradients(rows: int, columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def test_soap_is_adam_in_the_eigenbases_of_shampoo() -> None:
    """The paper's algorithm 3: the first step makes the bases, and one step of power iteration renews them."""
    lr, decay, beta, every = 0.01, 0.1, 0.95, 5
    weight = torch.ones(5, 5, dtype=torch.float64)
    left, right, mean, square, q, p = (torch.zeros_like(weight) for _ in range(6))
    for step, g in enumerate(gradients(5, 5)):
        if step:
            mean, square = beta * mean + (1 - beta) * g, beta * square + (1 - beta) * (q.T @ g @ p) ** 2
            corrected = mean / (1 - beta**step), square / (1 - beta**step)
            update = q @ (q.T @ corrected[0] @ p / (corrected[1].sqrt() + 1e-8)) @ p.T
            weight = (1 - lr * decay) * (weight - lr * update)
        left, right = beta * left + (1 - beta) * g @ g.T, beta * right + (1 - beta) * g.T @ g
        if step == 0:
            q, p = (torch.linalg.eigh(of_side).eigenvectors for of_side in (left, right))
        elif step % every == 0:
            bases = []
            for of_side, basis, axis in ((left, q, 0), (right, p, 1)):
                order = (basis.T @ of_side @ basis).diagonal().argsort(descending=True)
                bases.append(torch.linalg.qr(of_side @ basis[:, order]).Q)
                square = square.index_select(axis, order)
            q, p = bases
    found = trained("soap", gradients(5, 5), lr=lr, weight_decay=decay, precondition_frequency=every)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-6)  # its QR decomposition is in float32


def test_shampoo_takes_fourth_roots_of_both_sides() -> None:
    """The paper's algorithm 1."""
    lr, decay, epsilon = 0.1, 0.1, 1e-6
    weight = torch.ones(5, 4, dtype=torch.float64)
    left, right = (epsilon * torch.eye(side, dtype=torch.float64) for side in weight.shape)
    for g in gradients(5, 4):
        left, right = left + g @ g.T, right + g.T @ g
        roots = []
        for of_side in (left, right):
            values, vectors = torch.linalg.eigh(of_side)
            roots.append(vectors * values**-0.25 @ vectors.T)
        weight = (1 - lr * decay) * weight - lr * roots[0] @ g @ roots[1]
    found = trained("shampoo", gradients(5, 4), lr=lr, weight_decay=decay)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-12)


def network() -> nn.Sequential:
    """With a parameter of most roles."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 8), nn.Conv1d(5, 6, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 7)
    )


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[float]:
    inputs = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs[:, :5].flatten(0, 1), inputs.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize("preset", ["sgd", "adam", "adamw", "soap", "shampoo"])
def test_each_takes_the_groups_trains_and_goes_on_exactly(preset: str) -> None:
    """Its state is plain tensors and numbers, which are loaded without running code."""
    model = network()
    optimizer = make(preset, route_parameters(model, lr_by_role={"embedding": 0.03}))
    given = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert given["embedding"] == (0.03, given["head"][1])
    assert given["vector"] == (given["head"][0], 0.0)
    losses = list(train(model, optimizer, STEPS))
    assert losses[-1] < losses[0]

    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    twin = copy.deepcopy(model)
    resumed = make(preset, route_parameters(twin, lr_by_role={"embedding": 0.03}))
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert list(train(twin, resumed, STEPS)) == list(train(model, optimizer, STEPS))
    for own, other in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, other)
