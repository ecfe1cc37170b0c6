"""Matrices inside parameters."""

import pytest
import torch

from lightning_muon.optim import MatrixLayout

CASES = [
    # layout, shape of the parameter, shape of its matrices, fan-out, fan-in
    (MatrixLayout(), (6, 4), (1, 6, 4), 6, 4),
    (MatrixLayout(), (6, 4, 3, 5), (1, 6, 60), 6, 60),
    (MatrixLayout(transposed=True), (6, 4), (1, 6, 4), 4, 6),
    (MatrixLayout(transposed=True), (6, 4, 3, 5), (1, 6, 60), 60, 6),
    (MatrixLayout(blocks=3), (6, 4), (3, 2, 4), 2, 4),
    (MatrixLayout(blocks=3, transposed=True), (4, 6), (3, 4, 2), 2, 4),
    (MatrixLayout(stacked=True), (5, 6, 4), (5, 6, 4), 6, 4),
    (MatrixLayout(stacked=True, blocks=2), (5, 6, 4), (10, 3, 4), 3, 4),
    (MatrixLayout(stacked=True, blocks=2, transposed=True), (5, 4, 6), (10, 4, 3), 3, 4),
    (MatrixLayout(blocks=2), (6, 4, 3, 3), (2, 3, 36), 3, 36),
]


@pytest.mark.parametrize(("layout", "shape", "matrices", "fan_out", "fan_in"), CASES)
def test_layout(
    layout: MatrixLayout, shape: tuple[int, ...], matrices: tuple[int, ...], fan_out: int, fan_in: int
) -> None:
    parameter = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    layout.check(shape)
    batch = layout.matrices(parameter)
    assert tuple(batch.shape) == matrices
    assert torch.equal(layout.restore(batch, shape), parameter)
    assert layout.fans(shape) == (fan_out, fan_in)
    assert layout.count(shape) == matrices[0]


def test_blocks_lie_along_the_outputs() -> None:
    q, k, v = torch.randn(3, 5, 4)
    assert torch.equal(MatrixLayout(blocks=3).matrices(torch.cat([q, k, v])), torch.stack([q, k, v]))
    stored_in_out = torch.cat([q, k, v]).mT
    expected = torch.stack([q.mT, k.mT, v.mT])
    assert torch.equal(MatrixLayout(blocks=3, transposed=True).matrices(stored_in_out), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_read_in_logical_order(memory_format: torch.memory_format) -> None:
    weight = torch.randn(6, 4, 3, 3)
    strided = weight.contiguous(memory_format=memory_format)
    assert torch.equal(MatrixLayout().matrices(strided)[0], weight.reshape(6, 36))


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (MatrixLayout(), (6,), "holds no matrix"),
        (MatrixLayout(stacked=True), (6, 4), "holds no stack of matrices"),
        (MatrixLayout(blocks=4), (6, 4), "does not divide into 4 blocks"),
        (MatrixLayout(blocks=4, transposed=True), (4, 6), "does not divide into 4 blocks"),
        (MatrixLayout(blocks=0), (6, 4), "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(layout: MatrixLayout, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(shape)
