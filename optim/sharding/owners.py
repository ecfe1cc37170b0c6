"""The transport to owners: each matrix is orthogonalized by one rank, whatever shards of it the ranks have."""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_muon.optim.sharding.buckets import Bucket, Piece
from lightning_muon.optim.sharding.exchange import UnitNumbers, gather, scatter, wire_dtype
from lightning_muon.optim.sharding.sharding import Unit
from lightning_muon.optim.update.muon import (
    Here,
    Hooks,
    MuonParameter,
    Stages,
    Steps,
    Transport,
    neuron_factors,
    same_shape_batches,
)
from lightning_muon.optim.update.options import MuonOptions
from lightning_muon.optim.update.state import state_dtype


class Owners(Transport):
    """Send the pieces of each matrix to the rank that owns it, and the polar factor back to the shards.

    Every rank of the group takes part with the same bucket and options. The collectives and their order depend on these
    alone, not on whether a rank has elements of a parameter or a gradient for it: without gradient it enters as zeros.
    The steps of a batch are this rank's shards, one tensor for each parameter.

    Args:
        bucket: What travels together.
        batch: This rank's shards of its parameters, possibly empty ones.
    """

    def __init__(self, bucket: Bucket, batch: Sequence[MuonParameter], options: MuonOptions, hooks: Hooks) -> None:
        super().__init__(batch, options, hooks)
        self.bucket = bucket

    @override
    def polar(self, sources: Sequence[Tensor]) -> Stages[tuple[Steps, UnitNumbers | None]]:
        dtype = wire_dtype(sources[0], self.options)
        units = yield from gather(self.bucket, sources, dtype)
        factors, norms = yield from self._orthogonalize_owned(units)
        shards, norms = yield from scatter(self.bucket, factors, norms, dtype, sources[0].device)
        # A factor has the dtype of the momentum, as on one device.
        return [
            shard.view(p.weight.shape).to(state_dtype("momentum_buffer", p.weight))
            for p, shard in zip(self.batch, shards, strict=True)
        ], norms

    @override
    def normalize_neurons(self, steps: Steps, mean_squares: Sequence[Tensor]) -> Steps:
        sums = []
        for piece in self.bucket.here:
            averages = self.bucket.take(piece, mean_squares)
            squares = self.bucket.take(piece, steps).to(averages.dtype).square()
            sums.append(torch.stack([neuron_sums(elements, piece) for elements in (averages, squares)]))
        self._all_reduce([s for s, p in zip(sums, self.bucket.here, strict=True) if p.unit.is_split])
        factors: UnitNumbers = {}
        for p, of_unit in zip(self.bucket.here, sums, strict=True):
            by_shape = zip(*(split_by_shape(s, p.unit) for s in of_unit), p.unit.fans, strict=True)
            found = [neuron_factors(averages / fan_in, squares) for averages, squares, (_, fan_in) in by_shape]
            factors[p.key] = _joined([of_shape.flatten() for of_shape in found])
        return self._multiply(steps, factors)

    @override
    def scale(self, steps: Steps, norms: UnitNumbers) -> Steps:
        of_neurons = {}
        for p in self.bucket.here:
            if p.numel:
                by_shape = zip(norms[p.key].split(p.unit.counts), p.unit.fans, strict=True)
                of_neurons[p.key] = _joined(
                    [of_shape.repeat_interleave(fan_out) for of_shape, (fan_out, _) in by_shape]
                )
        return self._multiply(steps, of_neurons)

    def _orthogonalize_owned(self, units: Sequence[Tensor]) -> Stages[tuple[list[Tensor], UnitNumbers | None]]:
        """Orthogonalize the units that this rank owns, matrices of one shape as one batch."""
        owned = self.bucket.owned
        as_parameters = [
            replace(self.batch[m], layout=u.layout, weight=elements.view(u.shape), momentum=None)
            for (m, u), elements in zip(owned, units, strict=True)
        ]
        # A replicated unit without gradient has none on any rank.
        moving = [
            p for p, (_, u) in zip(as_parameters, owned, strict=True) if p.gradient is not None or not u.replicated
        ]
        here = Here(list(same_shape_batches(moving, sys.maxsize)), self.options, self.hooks)
        polar, norms = yield from here.polar([p.weight for p in here.batch])
        found = {id(p): factor.reshape(-1) for p, factor in zip(here.batch, here.split(polar), strict=True)}
        factors = [
            found[id(p)] if id(p) in found else torch.zeros_like(e) for p, e in zip(as_parameters, units, strict=True)
        ]
        if norms is None:
            return factors, None
        of_units = {id(p): _joined([n.flatten() for n in by_shape]) for p, by_shape in here.by_parameter(norms)}
        return factors, {
            (m, u.start): of_units.get(id(p), e.new_zeros(u.count))
            for (m, u), p, e in zip(owned, as_parameters, units, strict=True)
        }

    def _multiply(self, steps: Steps, of_neurons: UnitNumbers) -> Steps:
        """Multiply the elements of each shard by the numbers of their neurons."""
        numbers: list[list[Tensor]] = [[] for _ in steps]
        for p in self.bucket.here:
            if p.numel:
                numbers[p.member].append(spread_over_neurons(of_neurons[p.key], p))
        return [
            step * torch.cat(found).view(step.shape) if found else step
            for step, found in zip(steps, numbers, strict=True)
        ]

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        """Sum tensors over the ranks, in place, in one collective."""
        if not sums:
            return
        packed = torch.cat([s.flatten() for s in sums])
        dist.all_reduce(packed, group=self.bucket.group)
        for s, total in zip(sums, packed.split([s.numel() for s in sums]), strict=True):
            s.copy_(total.view(s.shape))


def neuron_sums(elements: Tensor, piece: Piece) -> Tensor:
    """Sum the elements (elements,) of a piece over each neuron, shape (neurons of all matrices in the unit,).

    The sum is zero for neurons of which the piece has no element.
    """
    unit = piece.unit
    if not unit.layout.neurons_in_order:
        if piece.numel == 0:
            return elements.new_zeros(sum(count * out for count, (out, _) in zip(unit.counts, unit.fans, strict=True)))
        whole = elements.new_zeros(unit.numel)
        whole[piece.in_unit] = elements
        inputs = -2 if unit.layout.transposed else -1
        return _joined([of_shape.sum(inputs).flatten() for of_shape in unit.layout.matrices(whole.view(unit.shape))])
    rows, columns, parts = _rows(piece, elements.device)
    margin = piece.in_unit.start % columns
    padded = pad(elements, (margin, parts.numel() * columns - margin - piece.numel)).view(-1, columns)
    if unit.layout.transposed:
        sums = padded.new_zeros(unit.shape[0], columns)
        return sums.index_add_(0, parts, padded).flatten()
    sums = padded.new_zeros(unit.shape[0] * unit.shape[1])
    sums[rows] = padded.sum(dim=1)
    return sums


def spread_over_neurons(values: Tensor, piece: Piece) -> Tensor:
    """Return for each element of a piece the value of its neuron; ``values`` has the order of :func:`neuron_sums`."""
    unit = piece.unit
    if not unit.layout.neurons_in_order:
        matrices = [
            of_shape.unsqueeze(-2).expand(-1, fan_in, -1)
            if unit.layout.transposed
            else of_shape.unsqueeze(-1).expand(-1, -1, fan_in)
            for of_shape, (_, fan_in) in zip(split_by_shape(values, unit), unit.fans, strict=True)
        ]
        return unit.layout.restore(matrices, unit.shape).flatten()[piece.in_unit]
    rows, columns, parts = _rows(piece, values.device)
    of_rows = values.view(-1, columns)[parts] if unit.layout.transposed else values[rows, None]
    margin = piece.in_unit.start % columns
    return of_rows.expand(-1, columns).reshape(-1)[margin : margin + piece.numel]


def split_by_shape(of_neurons: Tensor, unit: Unit) -> list[Tensor]:
    """Split numbers in the order of :func:`neuron_sums` into those of each shape of matrix, (b, fan-out)."""
    neurons = [count * fan_out for count, (fan_out, _) in zip(unit.counts, unit.fans, strict=True)]
    split = of_neurons.split(neurons)
    return [of_shape.view(-1, fan_out) for of_shape, (fan_out, _) in zip(split, unit.fans, strict=True)]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _rows(piece: Piece, device: torch.device) -> tuple[slice, int, Tensor]:
    """Return the stored rows of which a piece has elements, their length, and the part of the unit that each is in."""
    unit = piece.unit
    columns = unit.numel // (unit.shape[0] * unit.shape[1])
    rows = slice(piece.in_unit.start // columns, -(-piece.in_unit.stop // columns))
    return rows, columns, torch.arange(rows.start, rows.stop, device=device) // unit.shape[1]
