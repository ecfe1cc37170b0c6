"""Where the matrices are inside a parameter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """Describe how a parameter stores one or several matrices.

    The default describes the weight of ``nn.Linear``, (out, in), and of a convolution, (out, in, kh, kw), whose matrix
    is (out, in·kh·kw).

    Args:
        stacked: The first dimension counts matrices, as in the expert weights (E, out, in) of a mixture of experts.
        blocks: Number of matrices side by side along the output dimension, as in a fused query-key-value projection
            (3·out, in), or in a grouped convolution.
        transposed: Stored (in, out), as by ``nn.ConvTranspose2d`` or the ``Conv1D`` of GPT-2.
    """

    stacked: bool = False
    blocks: int = 1
    transposed: bool = False

    def check(self, shape: Sequence[int]) -> None:
        """Raise a ValueError with the reason if a parameter of this shape cannot have this layout."""
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if len(shape) < 2 + self.stacked:
            raise ValueError(
                f"shape {tuple(shape)} holds no {'stack of matrices' if self.stacked else 'matrix'}:"
                f" it needs at least {2 + self.stacked} dimensions"
            )
        outputs = shape[self.stacked + self.transposed]
        if outputs % self.blocks:
            raise ValueError(f"shape {tuple(shape)} does not divide into {self.blocks} blocks along its outputs")

    def matrices(self, tensor: Tensor) -> Tensor:
        """Return the matrices of ``tensor`` as a batch (b, rows, columns), a view where the memory allows it."""
        stack = tensor.shape[0] if self.stacked else 1
        rows = tensor.shape[self.stacked]
        columns = math.prod(tensor.shape[self.stacked + 1 :])
        if self.transposed:
            split = tensor.reshape(stack, rows, self.blocks, columns // self.blocks)
            return split.transpose(1, 2).flatten(0, 1)
        return tensor.reshape(stack * self.blocks, rows // self.blocks, columns)

    def count(self, shape: Sequence[int]) -> int:
        """Return the number of matrices in a parameter of this shape."""
        return (shape[0] if self.stacked else 1) * self.blocks

    def restore(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`matrices`: arrange a batch (b, rows, columns) in the shape of the parameter."""
        if self.transposed and self.blocks > 1:
            matrices = matrices.unflatten(0, (-1, self.blocks)).transpose(1, 2)
        return matrices.reshape(tuple(shape))

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the fan-out and the fan-in of each matrix of a parameter of this shape."""
        rows, columns = shape[self.stacked], math.prod(shape[self.stacked + 1 :])
        fan_out, fan_in = (columns, rows) if self.transposed else (rows, columns)
        return fan_out // self.blocks, fan_in

    def parts(self, shape: Sequence[int]) -> tuple[int, tuple[int, ...], "MatrixLayout"]:
        """Cut a parameter of this shape into the smallest parts that are whole matrices and contiguous in memory.

        A part is one matrix, or, where fused blocks are stored (in, out) and share their rows, all of these. The result
        is the number of parts, the shape of each, and the layout of a stack (parts, *shape of each).
        """
        count = (shape[0] if self.stacked else 1) * (1 if self.transposed else self.blocks)
        rows, *rest = shape[self.stacked :]
        part = (rows if self.transposed else rows // self.blocks, *rest)
        return count, part, MatrixLayout(True, self.blocks if self.transposed else 1, self.transposed)


def matrix_layouts(group: Mapping[str, Any]) -> list[MatrixLayout]:
    """Return the layout of each parameter of a group; the default layout if the group has none."""
    if "layouts" not in group:
        return [MatrixLayout()] * len(group["params"])
    return [MatrixLayout(**layout) for layout in group["layouts"]]
