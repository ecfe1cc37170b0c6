"""The transport to owners: each matrix is orthogonalized by one rank, whatever shards of it the ranks have."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_muon.optim.sharding.buckets import Bucket, Piece
from lightning_muon.optim.sharding.exchange import UnitNumbers, gather, scatter, wire_dtype
from lightning_muon.optim.sharding.sharding import Unit
from lightning_muon.optim.update.muon import MuonParameter, OrthogonalizeHook, Stages, Steps, Transport, neuron_factors
from lightning_muon.optim.update.options import MuonOptions
from lightning_muon.optim.update.scale import nuclear_norm
from lightning_muon.optim.update.state import state_dtype


class Owners(Transport):
    """Send the pieces of each matrix to the rank that owns it, and the polar factor back to the shards.

    Every rank of the group takes part with the same bucket and options. The collectives and their order depend on these
    alone, not on whether a rank has elements of a parameter or a gradient for it: without gradient it enters as zeros.
    The steps of a batch are this rank's shards, one tensor for each parameter.

    Args:
        bucket: What travels together.
        batch: This rank's shards of its parameters, possibly empty ones.
        options: Those of the parameter group.
        hooks: Listeners to the polar factors of the matrices that this rank owns.
    """

    def __init__(
        self,
        bucket: Bucket,
        batch: Sequence[MuonParameter],
        options: MuonOptions,
        hooks: Sequence[OrthogonalizeHook] = (),
    ) -> None:
        super().__init__(batch, options, hooks)
        self.bucket = bucket

    @override
    def polar(self, sources: Sequence[Tensor]) -> Stages[tuple[Steps, UnitNumbers | None]]:
        dtype = wire_dtype(sources[0], self.options)
        units = yield from gather(self.bucket, sources, dtype)
        factors, norms = self._orthogonalize_owned(units)
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
        self._all_reduce([s for s, p in zip(sums, self.bucket.here, strict=True) if is_split(p.unit)])
        factors: UnitNumbers = {}
        for p, (averages, squares) in zip(self.bucket.here, sums, strict=True):
            shape = (-1, neurons_per_matrix(p.unit))
            per_neuron = p.unit.numel // squares.numel()
            factors[p.member, p.unit.start] = neuron_factors(averages.view(shape) / per_neuron, squares.view(shape))
        return self._multiply(steps, factors)

    @override
    def scale(self, steps: Steps, norms: UnitNumbers) -> Steps:
        of_neurons = {
            (p.member, p.unit.start): norms[p.member, p.unit.start].repeat_interleave(neurons_per_matrix(p.unit))
            for p in self.bucket.here
            if p.numel
        }
        return self._multiply(steps, of_neurons)

    def _orthogonalize_owned(self, units: Sequence[Tensor]) -> tuple[list[Tensor], UnitNumbers | None]:
        """Orthogonalize the units that this rank owns, matrices of one shape as one batch."""
        owned = self.bucket.owned
        factors = [torch.zeros_like(unit) for unit in units]
        norms: UnitNumbers | None = None
        if self.needs_norms:
            norms = {(m, u.start): e.new_zeros(u.layout.count(u.shape)) for e, (m, u) in zip(units, owned, strict=True)}
        alike: defaultdict[Any, list[int]] = defaultdict(list)
        for number, (member, unit) in enumerate(owned):
            if unit.replicated and self.batch[member].gradient is None:
                continue  # no rank has a gradient
            alike[unit.layout.fans(unit.shape), unit.layout.transposed, units[number].dtype].append(number)
        for numbers in alike.values():
            stacks = [owned[n][1].layout.matrices(units[n].view(owned[n][1].shape)) for n in numbers]
            matrices = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
            counts = [len(stack) for stack in stacks]
            names = [
                self.batch[owned[n][0]].name for n, count in zip(numbers, counts, strict=True) for _ in range(count)
            ]
            polar = self.orthogonalize(names, matrices)
            for number, factor in zip(numbers, polar.split(counts), strict=True):
                unit = owned[number][1]
                factors[number] = unit.layout.restore(factor, unit.shape).reshape(-1)
            if norms is not None:
                found = nuclear_norm(matrices, polar).flatten().split(counts)
                norms |= {(owned[n][0], owned[n][1].start): norm for n, norm in zip(numbers, found, strict=True)}
        return factors, norms

    def _multiply(self, steps: Steps, of_neurons: UnitNumbers) -> Steps:
        """Multiply the elements of each shard by the numbers of their neurons."""
        numbers: list[list[Tensor]] = [[] for _ in steps]
        for p in self.bucket.here:
            if p.numel:
                numbers[p.member].append(spread_over_neurons(of_neurons[p.member, p.unit.start].flatten(), p))
        return [
            step * torch.cat(found).view(step.shape) if found else step
            for step, found in zip(steps, numbers, strict=True)
        ]

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        """Add tensors up over the ranks, in place, in one collective."""
        if not sums:
            return
        packed = torch.cat([s.flatten() for s in sums])
        dist.all_reduce(packed, group=self.bucket.group)
        for s, total in zip(sums, packed.split([s.numel() for s in sums]), strict=True):
            s.copy_(total.view(s.shape))


def is_split(unit: Unit) -> bool:
    """Return whether several ranks have different elements of a unit."""
    return unit.only_rank is None and not unit.replicated


def neurons_per_matrix(unit: Unit) -> int:
    """Return the number of neurons, the outputs, of each matrix in a unit."""
    return unit.layout.fans(unit.shape)[0]


def neuron_sums(elements: Tensor, piece: Piece) -> Tensor:
    """Sum the elements (elements,) of a piece over each neuron.

    Returns:
        Shape (neurons of all matrices in the unit,); zero for neurons of which the piece has no element.
    """
    unit = piece.unit
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
    rows, columns, parts = _rows(piece, values.device)
    of_rows = values.view(-1, columns)[parts] if piece.unit.layout.transposed else values[rows, None]
    margin = piece.in_unit.start % columns
    return of_rows.expand(-1, columns).reshape(-1)[margin : margin + piece.numel]


def _rows(piece: Piece, device: torch.device) -> tuple[slice, int, Tensor]:
    """Return the stored rows of which a piece has elements, their length, and the part of the unit that each is in."""
    unit = piece.unit
    columns = unit.numel // (unit.shape[0] * unit.shape[1])
    rows = slice(piece.in_unit.start // columns, -(-piece.in_unit.stop // columns))
    return rows, columns, torch.arange(rows.start, rows.stop, device=device) // unit.shape[1]
