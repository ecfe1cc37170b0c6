"""Where the matrices are inside a parameter."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """Describe how a parameter stores one or several matrices.

    The default describes the weight of ``nn.Linear``, (out, in), and of a convolution, (out, in, kh, kw), whose matrix
    is (out, in·kh·kw). Otherwise the weight, or each matrix of a stack, is cut along its outputs or its inputs into
    blocks that are matrices of their own, of one shape or of several::

        MatrixLayout(blocks=3)  # query, key and value, (3·out, in)
        MatrixLayout(split_sizes=(512, 128, 128))  # query, key and value of grouped-query attention
        MatrixLayout(blocks=3, interleaved=12)  # query, key and value of one head, then of the next, as in GPT-NeoX
        MatrixLayout(blocks=12, along_inputs=True)  # the output projection of attention, one block a head

    Args:
        stacked: The first dimension counts matrices, as in the expert weights (E, out, in) of a mixture of experts.
        blocks: Number of blocks of one size, as in a fused query-key-value projection or in a grouped convolution.
        transposed: Stored (in, out), as by ``nn.ConvTranspose2d`` or the ``Conv1D`` of GPT-2.
        split_sizes: The sizes of the blocks, instead of ``blocks``, where they differ.
        interleaved: How often the pattern of blocks repeats. A block consists of its pieces in all repetitions, so
            ``split_sizes`` are then the sizes of pieces.
        along_inputs: Cut the inputs instead of the outputs.
    """

    stacked: bool = False
    blocks: int = 1
    transposed: bool = False
    split_sizes: tuple[int, ...] = ()
    interleaved: int = 1
    along_inputs: bool = False

    def __post_init__(self) -> None:
        """Take ``split_sizes`` as any sequence: files have lists."""
        object.__setattr__(self, "split_sizes", tuple(self.split_sizes))

    def check(self, shape: Sequence[int]) -> None:
        """Raise a ValueError with the reason if a parameter of this shape cannot have this layout."""
        numbers = {"blocks": self.blocks, "interleaved": self.interleaved}
        numbers |= {f"split_sizes[{i}]": size for i, size in enumerate(self.split_sizes)}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if self.split_sizes and self.blocks > 1:
            raise ValueError(f"give blocks={self.blocks} or split_sizes={self.split_sizes}, not both")
        if len(shape) < 2 + self.stacked:
            raise ValueError(
                f"shape {tuple(shape)} holds no {'stack of matrices' if self.stacked else 'matrix'}:"
                f" it needs at least {2 + self.stacked} dimensions"
            )
        size = shape[self.stacked + self._cuts_columns]
        where = f"along its {size} {'inputs' if self.along_inputs else 'outputs'}"
        repeated = f", repeated {self.interleaved} times" if self.interleaved > 1 else ""
        if self.split_sizes and size != (total := sum(self.split_sizes)) * self.interleaved:
            raise ValueError(
                f"shape {tuple(shape)} does not divide into blocks of sizes {self.split_sizes}{repeated},"
                f" {total * self.interleaved} together, {where}"
            )
        if size % (self.blocks * self.interleaved):
            raise ValueError(f"shape {tuple(shape)} does not divide into {self.blocks} blocks{repeated} {where}")

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """Return the matrices of ``tensor`` as a batch (b, rows, columns) for each distinct shape.

        The batches have the order in which their shapes first occur, as in :meth:`fans` and :meth:`counts`. They are
        views where the memory allows it.
        """
        if self._is_single and tensor.ndim == 2:
            return [tensor.unsqueeze(0)]
        stack, rows, columns = self._sizes(tensor.shape)
        if self._is_plain:
            return [tensor.reshape(stack * self.blocks, rows // self.blocks, columns)]
        runs = self._runs(tensor.shape)
        if len(runs) == 1:
            return [self._separate(tensor, *runs[0], tensor.shape).flatten(0, 1)]
        cut = self._cut_dimension
        pattern = sum(size * number for size, number in runs)
        whole = tensor.reshape(
            (stack, rows, self.interleaved, pattern) if cut == 3 else (stack, self.interleaved, pattern, columns)
        )
        found: defaultdict[int, list[Tensor]] = defaultdict(list)
        for (size, number), run in zip(runs, whole.split([size * number for size, number in runs], cut), strict=True):
            found[size].append(self._separate(run, size, number, tensor.shape))
        return [(torch.cat(same, 1) if len(same) > 1 else same[0]).flatten(0, 1) for same in found.values()]

    def restore(self, batches: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Undo :meth:`matrices`: arrange batches (b, rows, columns) in the shape of the parameter."""
        if self._is_single and len(shape) == 2:
            return batches[0].squeeze(0)
        if self._is_plain:
            return batches[0].reshape(tuple(shape))
        runs = self._runs(shape)
        if len(runs) == 1:
            return self._interleave(batches[0], *runs[0], shape).reshape(tuple(shape))
        cut = self._cut_dimension
        of_size: dict[int, list[Tensor]] = {}
        for batch, size in zip(batches, dict.fromkeys(size for size, _ in runs), strict=True):
            numbers = [number for same, number in runs if same == size]
            of_size[size] = list(self._interleave(batch, size, sum(numbers), shape).split(numbers, cut))
        pieces = [of_size[size].pop(0).flatten(cut, cut + 1) for size, _ in runs]
        return torch.cat(pieces, cut).reshape(tuple(shape))

    def fans(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return, for each batch of :meth:`matrices`, the fan-out and the fan-in of a matrix."""
        _, rows, columns = self._sizes(shape)
        fan_out, fan_in = (columns, rows) if self.transposed else (rows, columns)
        if not self.split_sizes:
            blocks = self.blocks
            return [(fan_out, fan_in // blocks) if self.along_inputs else (fan_out // blocks, fan_in)]
        sizes = [size * self.interleaved for size in dict.fromkeys(size for size, _ in self._runs(shape))]
        return [(fan_out, size) if self.along_inputs else (size, fan_in) for size in sizes]

    def counts(self, shape: Sequence[int]) -> list[int]:
        """Return, for each batch of :meth:`matrices`, the number of its matrices."""
        stack = shape[0] if self.stacked else 1
        if not self.split_sizes:
            return [stack * self.blocks]
        return [stack * self.split_sizes.count(size) for size in dict.fromkeys(self.split_sizes)]

    def firsts(self, shape: Sequence[int]) -> list[list[int]]:
        """Return, for each batch of :meth:`matrices`, the place of each first element in the flat parameter.

        By it a matrix is known, also where a rank has only some of the parameter's: see :meth:`place_of`.
        """
        stack, rows, columns = self._sizes(shape)
        found: dict[int, list[int]] = {}
        start = 0
        for size, number in self._runs(shape):
            of_size = found.setdefault(size, [])
            of_size += [start + size * block for block in range(number)]
            start += size * number
        step = 1 if self._cuts_columns else columns
        return [
            [entry * rows * columns + start * step for entry in range(stack) for start in starts]
            for starts in found.values()
        ]

    def place_of(self, first: int, shape: Sequence[int]) -> tuple[int, int]:
        """Return of a matrix, given its first element, the place in the stack, and of the block in the entry."""
        _, rows, columns = self._sizes(shape)
        entry, rest = divmod(first, rows * columns)
        one = replace(self, stacked=False).firsts(shape[self.stacked :])
        starts = sorted(start for of_shape in one for start in of_shape)
        return entry, starts.index(rest)

    def count(self, shape: Sequence[int]) -> int:
        """Return the number of matrices in a parameter of this shape."""
        return 1 if self._is_single else sum(self.counts(shape))

    def parts(self, shape: Sequence[int]) -> list[tuple[int, tuple[int, ...], "MatrixLayout"]]:
        """Cut a parameter of this shape into the smallest parts that are whole matrices and contiguous in memory.

        A part is one matrix, or a whole entry of the stack where blocks share memory rows, as those that are stored
        (in, out), or alternate. The result has, for each run of equal parts in the order of memory, their number, the
        shape of each, and the layout of a stack ``(parts, *shape of each)``.
        """
        stack = shape[0] if self.stacked else 1
        rows, *rest = shape[self.stacked :]
        plain = MatrixLayout(stacked=True, transposed=self.transposed)
        if not self._is_cut:
            return [(stack, (rows, *rest), plain)]
        if self._cuts_columns or self.interleaved > 1 or (self.split_sizes and self.stacked):
            return [(stack, (rows, *rest), replace(self, stacked=True))]
        return [(stack * number, (size, *rest), plain) for size, number in self._runs(shape)]

    @property
    def neurons_in_order(self) -> bool:
        """Whether the stored rows, or columns if transposed, are the neurons of one matrix after those of another."""
        return not self._is_cut or (not self.along_inputs and not self.split_sizes and self.interleaved == 1)

    @cached_property
    def _is_cut(self) -> bool:
        return self.blocks > 1 or len(self.split_sizes) > 1

    @cached_property
    def _is_single(self) -> bool:
        """Whether the parameter is one matrix: most are, and a step asks often."""
        return not self.stacked and not self._is_cut

    @cached_property
    def _cuts_columns(self) -> bool:
        return self.transposed != self.along_inputs

    @property
    def _cut_dimension(self) -> int:
        """The dimension of the blocks where one more, before it, counts the repetitions."""
        return 2 + self._cuts_columns

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the matrices are one after another in memory, and of one shape."""
        return not self._is_cut or not (self._cuts_columns or self.split_sizes or self.interleaved > 1)

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the length of the stack, and the rows and columns of an entry."""
        return shape[0] if self.stacked else 1, shape[self.stacked], math.prod(shape[self.stacked + 1 :])

    def _separate(self, run: Tensor, size: int, number: int, shape: Sequence[int]) -> Tensor:
        """Return adjacent blocks of one size, repeated along the dimension that is cut, as (stack, number, m, n)."""
        stack, rows, columns = self._sizes(shape)
        if self._cuts_columns:
            return run.reshape(stack, rows, self.interleaved, number, size).permute(0, 3, 1, 2, 4).flatten(3)
        return run.reshape(stack, self.interleaved, number, size, columns).transpose(1, 2).flatten(2, 3)

    def _interleave(self, batch: Tensor, size: int, number: int, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`_separate`, but for blocks and their sizes, which stay two dimensions."""
        stack, rows, columns = self._sizes(shape)
        if self._cuts_columns:
            return batch.reshape(stack, number, rows, self.interleaved, size).permute(0, 2, 3, 1, 4)
        return batch.reshape(stack, number, self.interleaved, size, columns).transpose(1, 2)

    def _runs(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return size and number of adjacent equal blocks in one repetition, in rows or columns of a matrix."""
        pattern = self._sizes(shape)[1 + self._cuts_columns] // self.interleaved
        if not self.split_sizes:
            return [(pattern // self.blocks, self.blocks)]
        kernel = pattern // sum(self.split_sizes)  # columns of a convolution for each of its channels
        return [(size * kernel, len(list(same))) for size, same in groupby(self.split_sizes)]


def matrix_layouts(group: Mapping[str, Any]) -> list[MatrixLayout]:
    """Return the layout of each parameter of a group; the default layout if the group has none."""
    if "layouts" not in group:
        return [MatrixLayout()] * len(group["params"])
    return [MatrixLayout(**layout) for layout in group["layouts"]]
