"""Matrices inside parameters."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

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
    (batch,) = layout.matrices(parameter)
    assert tuple(batch.shape) == matrices
    assert torch.equal(layout.restore([batch], shape), parameter)
    assert layout.fans(shape) == [(fan_out, fan_in)]
    assert layout.counts(shape) == [matrices[0]]


# Blocks of the sizes 6, 2, 4, 4 and 2: their pieces in a weight of 18 outputs or inputs, and how the layout says it.
SIZES = (6, 2, 4, 4, 2)
LAYOUTS = [{"split_sizes": SIZES}, {"split_sizes": (3, 1, 2, 2, 1), "interleaved": 2}, {"blocks": 3, "interleaved": 3}]


def fuse(blocks: Sequence[Tensor], repetitions: int, dim: int) -> Tensor:
    """Concatenate the first piece of each block, then the second of each."""
    pieces = [block.chunk(repetitions, dim) for block in blocks]
    return torch.cat([piece for repetition in zip(*pieces, strict=True) for piece in repetition], dim)


@pytest.mark.parametrize("given", LAYOUTS)
@pytest.mark.parametrize("along_inputs", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stack", [0, 3])
@pytest.mark.parametrize("kernel", [(), (2, 3)])
def test_blocks_of_every_kind(
    given: dict[str, Any], along_inputs: bool, transposed: bool, stack: int, kernel: tuple[int, ...]
) -> None:
    """A weight that is fused from blocks is cut into the same blocks, those of one shape together."""
    layout = MatrixLayout(bool(stack), transposed=transposed, along_inputs=along_inputs, **given)
    sizes = SIZES if layout.split_sizes else (6, 6, 6)
    dim = 1 if along_inputs != transposed else 0
    of_entries = []
    for _ in range(stack or 1):
        of_entries.append([torch.randn(size, 5, *kernel).transpose(0, dim).contiguous() for size in sizes])
    weights = [fuse(blocks, layout.interleaved, dim) for blocks in of_entries]
    weight = torch.stack(weights) if stack else weights[0]
    layout.check(weight.shape)

    batches = layout.matrices(weight)
    distinct = list(dict.fromkeys(sizes))
    expected = [
        torch.stack([b.flatten(1) for blocks in of_entries for b, size in zip(blocks, sizes, strict=True) if size == s])
        for s in distinct
    ]
    assert len(batches) == len(expected)
    for batch, blocks in zip(batches, expected, strict=True):
        assert torch.equal(batch, blocks)
    assert torch.equal(layout.restore(batches, weight.shape), weight)
    assert layout.counts(weight.shape) == [len(blocks) for blocks in expected]
    shapes = [tuple(blocks.shape[1:]) for blocks in expected]
    assert layout.fans(weight.shape) == [shape[::-1] if transposed else shape for shape in shapes]

    rest = weight.flatten()
    counted = 0
    for count, part, of_stack in layout.parts(weight.shape):
        elements, rest = rest.split([count * math.prod(part), rest.numel() - count * math.prod(part)])
        counted += of_stack.count((count, *part))
        for matrices in of_stack.matrices(elements.view(count, *part)):
            for matrix in matrices:
                assert any(torch.equal(matrix, block) for blocks in expected for block in blocks)
    assert rest.numel() == 0
    assert counted == layout.count(weight.shape)


def test_adjacent_rows_are_parts_of_their_own() -> None:
    plain = MatrixLayout(stacked=True)
    assert MatrixLayout(split_sizes=(6, 2, 2)).parts((10, 4)) == [(1, (6, 4), plain), (2, (2, 4), plain)]
    assert MatrixLayout(blocks=5).parts((10, 4)) == [(5, (2, 4), plain)]
    by_head = MatrixLayout(blocks=5, transposed=True, along_inputs=True)  # an output projection, stored (in, out)
    assert by_head.parts((10, 4)) == [(5, (2, 4), MatrixLayout(stacked=True, transposed=True))]


def test_blocks_are_views() -> None:
    """Without a copy, where one is not necessary."""
    weight = torch.randn(12, 8)
    for layout in (
        MatrixLayout(blocks=3),
        MatrixLayout(split_sizes=(6, 3, 3)),
        MatrixLayout(blocks=4, along_inputs=True),
        MatrixLayout(blocks=4, transposed=True),
    ):
        for batch in layout.matrices(weight):
            assert batch.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr(), layout


def test_a_layout_from_a_file() -> None:
    """Older files know three fields, and JSON has no tuples."""
    older = {"stacked": False, "blocks": 3, "transposed": True}
    assert MatrixLayout(**older) == MatrixLayout(blocks=3, transposed=True)
    layout = MatrixLayout(split_sizes=(6, 2, 2), interleaved=2)
    assert MatrixLayout(**json.loads(json.dumps(asdict(layout)))) == layout


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_read_in_logical_order(memory_format: torch.memory_format) -> None:
    weight = torch.randn(6, 4, 3, 3)
    strided = weight.contiguous(memory_format=memory_format)
    assert torch.equal(MatrixLayout().matrices(strided)[0][0], weight.reshape(6, 36))


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (MatrixLayout(), (6,), "holds no matrix"),
        (MatrixLayout(stacked=True), (6, 4), "holds no stack of matrices"),
        (MatrixLayout(blocks=4), (6, 4), "does not divide into 4 blocks"),
        (MatrixLayout(blocks=4, transposed=True), (4, 6), "does not divide into 4 blocks"),
        (MatrixLayout(blocks=0), (6, 4), "at least 1"),
        (MatrixLayout(interleaved=0), (6, 4), "interleaved must be at least 1, got 0"),
        (MatrixLayout(split_sizes=(6, 0)), (6, 4), r"split_sizes\[1\] must be at least 1, got 0"),
        (MatrixLayout(blocks=2, split_sizes=(3, 3)), (6, 4), "blocks=2 or split_sizes=.* not both"),
        (MatrixLayout(split_sizes=(4, 1)), (6, 4), r"blocks of sizes \(4, 1\), 5 together, along its 6 outputs"),
        (
            MatrixLayout(split_sizes=(1, 2), interleaved=3),
            (6, 4),
            r"sizes \(1, 2\), repeated 3 times, 9 together, along its 6 outputs",
        ),
        (MatrixLayout(blocks=3, along_inputs=True), (6, 4), "does not divide into 3 blocks along its 4 inputs"),
        (MatrixLayout(blocks=3, interleaved=4), (6, 4), "3 blocks, repeated 4 times along its 6 outputs"),
    ],
)
def test_what_does_not_fit_is_refused(layout: MatrixLayout, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(shape)
