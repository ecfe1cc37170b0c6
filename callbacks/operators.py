"""What a matrix does in its model, and how deep: ``attention.q`` in block 3, expert 2 of ``mlp.up`` in block 0."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from lightning_muon.callbacks.matrices import muon_groups
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.update.matrix_layout import MatrixLayout, matrix_layouts

# What the blocks of fused projections give, by a part of the projection's own name.
_PIECES = (
    ("kqv", ("k", "q", "v")),
    ("qkv", ("q", "k", "v")),
    ("query_key_value", ("q", "k", "v")),
    ("queries_keys_values", ("q", "k", "v")),
    ("c_attn", ("q", "k", "v")),
    ("c_attn", ("k", "v")),
    ("in_proj", ("q", "k", "v")),
    ("kv", ("k", "v")),
    ("keys_values", ("k", "v")),
    ("gate_up", ("gate", "up")),
    ("w13", ("w1", "w3")),
    ("w12", ("w1", "w2")),
)
# The heads of each piece, in the words of routing by head.
_BY_HEAD = re.compile(r"(query, )?key and value by head \(([\d, and]+)\)")
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)


class Operator(NamedTuple):
    """Where a matrix is in its model."""

    name: str  # the path of its parameter without numbers of layers and experts, and without what all have in front
    depth: int | None  # the first number in the path
    expert: int | None


class Operators:
    """Name the matrices of Muon's parameters, those of fused projections and of experts apart.

    Args:
        optimizers: With the groups.
        names: See :func:`~lightning_muon.callbacks.matrices.module_names`.
    """

    def __init__(self, optimizers: Iterable[Optimizer], names: Mapping[int, str]) -> None:
        self._order: dict[str, int] = {}
        self._stored: dict[str, tuple[MatrixLayout, Sequence[int], str]] = {}
        for labelled in muon_groups(optimizers):
            group = labelled.group
            # torch.optim.Muon takes a fused projection as one matrix.
            is_torchs = isinstance(labelled.optimizer, torch.optim.Muon)
            layouts = [MatrixLayout()] * len(group["params"]) if is_torchs else matrix_layouts(group)
            reasons = group.get("reasons") or [""] * len(layouts)
            for (name, parameter), *rest in zip(
                labelled.named_parameters(names), layouts, labelled.shardings, reasons, strict=True
            ):
                layout, sharding, reason = rest
                shape = parameter.shape if sharding is None else sharding.shape
                if sharding is not None or not is_flattened(parameter):
                    self._stored[name] = layout, shape, reason
        paths = {name: _path(name) for name in self._stored}
        shared = _shared([path for path, _, _ in paths.values()])
        self._paths = {name: (path[shared:], depth, expert) for name, (path, depth, expert) in paths.items()}

    def order(self, name: str) -> int:
        """Return a number that sorts the names of operators in the order of the model, and blocks as they are fused."""
        if not self._order:
            for parameter, (layout, shape, _) in self._stored.items():
                for first in sorted(first for of_shape in layout.firsts(shape) for first in of_shape):
                    self._order.setdefault(self.of(parameter, first).name, len(self._order))
                self._order.setdefault(self.of(parameter, None).name, len(self._order))
        return self._order.get(name, len(self._order))

    def of(self, name: str, first: int | None) -> Operator:
        """Return the operator of a matrix.

        Args:
            name: Of its parameter.
            first: The place of its first element in the flat parameter; ``None`` for the parameter as a whole.
        """
        path, depth, expert = self._paths.get(name) or _path(name)
        if first is None or name not in self._stored:
            return Operator(".".join(path), depth, expert)
        layout, shape, reason = self._stored[name]
        entry, block = layout.place_of(first, shape)
        piece = _piece(path[-1], sum(layout.counts(shape)) // (shape[0] if layout.stacked else 1), block, reason)
        path = path if piece is None else (*path[:-1], piece)
        return Operator(".".join(path), depth, entry if layout.stacked else expert)


def _path(name: str) -> tuple[tuple[str, ...], int | None, int | None]:
    """Return the parts of a name without ``weight`` and the numbers of its layer and its expert, and these."""
    kept: list[str] = []
    depth = expert = None
    for part in name.split("."):
        if part.isdigit() and kept and _EXPERTS.search(kept[-1]) and expert is None:
            expert = int(part)
        elif part.isdigit() and depth is None:
            depth = int(part)
        else:
            kept.append(part)
    if len(kept) > 1 and kept[-1] in {"weight", "kernel"}:
        kept.pop()
    if len(kept) > 1 and kept[-1].endswith(("_weight", "_kernel")):
        kept[-1] = kept[-1][: -len("_weight")]
    return tuple(kept), depth, expert


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """Return how many parts all paths have in front; each keeps its last."""
    shared = min((len(path) - 1 for path in paths), default=0)
    while shared and len({path[:shared] for path in paths}) > 1:
        shared -= 1
    return shared


def _piece(own: str, blocks: int, block: int, reason: str) -> str | None:
    """Return what a block of a fused projection gives; ``None`` if it is not fused, or that is not known."""
    if blocks == 1:
        return None
    if found := _BY_HEAD.search(reason):
        heads = [int(number) for number in re.findall(r"\d+", found[2])]
        ends = list(accumulate(heads))
        pieces = ("q", "k", "v") if found[1] else ("k", "v")
        return (
            next(piece for piece, end in zip(pieces, ends, strict=True) if block < end) if ends[-1] == blocks else None
        )
    if "query, value and key" in reason:
        return ("q", "v", "k")[block] if blocks == 3 else None
    return next((names[block] for part, names in _PIECES if part in own.lower() and len(names) == blocks), None)
