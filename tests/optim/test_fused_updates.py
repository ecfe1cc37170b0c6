"""A weight that contains several matrices is updated as if each were the weight of a layer of its own."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import MatrixLayout, MuonAdamW
from lightning_muon.optim.update.matrix_layout import matrix_layouts

LAYOUTS = [
    (MatrixLayout(split_sizes=(8, 2, 2)), (12, 6)),
    (MatrixLayout(split_sizes=(4, 1, 1), interleaved=2), (12, 6)),
    (MatrixLayout(blocks=3, interleaved=2), (12, 6)),
    (MatrixLayout(split_sizes=(2, 5, 2), transposed=True), (6, 9)),
    (MatrixLayout(split_sizes=(2, 5), along_inputs=True), (6, 7)),
    (MatrixLayout(blocks=2, transposed=True, along_inputs=True), (6, 7)),
    (MatrixLayout(stacked=True, split_sizes=(3, 1), interleaved=2), (3, 8, 6)),
    (MatrixLayout(stacked=True, blocks=3, interleaved=2, transposed=True), (2, 4, 12)),
]
OPTIONS: list[dict[str, Any]] = [
    {"update_scale": "moonlight", "cautious_weight_decay": True},
    {"update_scale": "keller_jordan", "neuron_beta": 0.9},
    {"update_scale": "mup", "polar_first": True, "neuron_beta": 0.5},
    {"update_scale": "nuclear_norm", "nesterov": False},
    {"update_scale": "nuclear_norm", "polar_first": True},
]


def whole_matrices(layout: MatrixLayout, tensor: Tensor) -> list[Tensor]:
    return [matrix.clone() for batch in layout.matrices(tensor) for matrix in batch]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_each_block_moves_as_a_layer_of_its_own(
    layout: MatrixLayout, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    alone = [torch.nn.Parameter(matrix) for matrix in whole_matrices(layout, weight.detach())]
    optimizers = []
    for params, where in (([weight], layout), (alone, MatrixLayout(transposed=layout.transposed))):
        group = {"params": params, "algorithm": "muon", "layouts": [asdict(where)] * len(params)}
        assert matrix_layouts(group)[0] == where
        optimizers.append(MuonAdamW([group], lr=0.1, orthogonalizer="svd", **options))
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        for parameter, gradient in zip(alone, whole_matrices(layout, weight.grad), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    for found, expected in zip(whole_matrices(layout, weight.detach()), alone, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-8)


def test_hooks_see_every_block() -> None:
    """As a polar factor, before the scale of its shape."""
    weight = torch.nn.Parameter(torch.randn(12, 6))
    weight.grad = torch.randn(12, 6)
    other = torch.nn.Parameter(torch.randn(8, 6))
    other.grad = torch.randn(8, 6)
    layouts = [asdict(MatrixLayout(split_sizes=(8, 2, 2))), asdict(MatrixLayout())]
    group = {"params": [weight, other], "param_names": ["qkv", "q"], "algorithm": "muon", "layouts": layouts}
    optimizer = MuonAdamW([group], orthogonalizer="svd")
    seen: list[tuple[list[str], Tensor]] = []
    optimizer.register_orthogonalize_hook(lambda names, factors: seen.append((names, factors.clone())))
    optimizer.step()
    assert [(names, tuple(factors.shape)) for names, factors in seen] == [
        (["qkv"], (1, 8, 6)),
        (["qkv", "qkv"], (2, 2, 6)),
        (["q"], (1, 8, 6)),
    ]
    for _, factors in seen:
        values = torch.linalg.svdvals(factors)
        torch.testing.assert_close(values, torch.ones_like(values))
