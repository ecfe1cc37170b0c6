"""The transport to owners: each matrix is orthogonalized by one rank, whatever shards of it the ranks have."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_muon.optim.sharding.buckets import Bucket
from lightning_muon.optim.sharding.exchange import UnitNorms, gather, scatter, wire_dtype
from lightning_muon.optim.sharding.sharding import Unit
from lightning_muon.optim.update.muon import MuonParameter, OrthogonalizeHook, Stages, Steps, Transport
from lightning_muon.optim.update.normuon import neuron_factors
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
    def polar(self, sources: Sequence[Tensor]) -> Stages[tuple[Steps, UnitNorms | None]]:
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
        places = [(member, unit) for member, units in enumerate(self.bucket.units) for unit in units]
        sums = []
        for member, unit in places:
            shard, start = self._slice(member, unit), self._start(unit)
            averages = mean_squares[member].reshape(-1)[shard]
            both = (averages, steps[member].reshape(-1)[shard].to(averages.dtype).square())
            sums.append(torch.stack([neuron_sums(piece, unit, start) for piece in both]))
        self._all_reduce([s for s, (_, unit) in zip(sums, places, strict=True) if _is_spread(unit)])
        factors = []
        for (_, unit), (mean_squares_sum, squares) in zip(places, sums, strict=True):
            neurons = neurons_per_matrix(unit)
            per_neuron = unit.numel // squares.numel()
            factors.append(neuron_factors(mean_squares_sum.view(-1, neurons) / per_neuron, squares.view(-1, neurons)))
        by_unit = {(member, unit.start): f.flatten() for (member, unit), f in zip(places, factors, strict=True)}
        return self._multiply(steps, by_unit)

    @override
    def scale(self, steps: Steps, norms: UnitNorms) -> Steps:
        by_unit = {
            (member, unit.start): norms[member, unit.start].repeat_interleave(neurons_per_matrix(unit))
            for member, units in enumerate(self.bucket.units)
            for unit in units
            if (member, unit.start) in norms
        }
        return self._multiply(steps, by_unit)

    def _orthogonalize_owned(self, units: Sequence[Tensor]) -> tuple[list[Tensor], UnitNorms | None]:
        """Orthogonalize the units that this rank owns, matrices of one shape as one batch."""
        owned = self.bucket.owned
        factors = [torch.zeros_like(unit) for unit in units]
        norms: UnitNorms | None = None
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

    def _multiply(self, steps: Steps, by_unit: dict[tuple[int, int], Tensor]) -> Steps:
        """Multiply each shard by the numbers of its neurons, which ``by_unit`` has for each unit."""
        scaled = []
        for member, step in enumerate(steps):
            numbers = [
                spread_over_neurons(by_unit[member, unit.start], unit, self._start(unit), self._stop(unit))
                for unit in self.bucket.units[member]
                if self._stop(unit) > self._start(unit)
            ]
            scaled.append(step * torch.cat(numbers).view(step.shape) if numbers else step)
        return scaled

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        """Add tensors up over the ranks, in place, in one collective."""
        if not sums:
            return
        packed = torch.cat([s.flatten() for s in sums])
        dist.all_reduce(packed, group=self.bucket.group)
        for s, total in zip(sums, packed.split([s.numel() for s in sums]), strict=True):
            s.copy_(total.view(s.shape))

    def _slice(self, member: int, unit: Unit) -> slice:
        """Return where this rank's piece of a unit is in its shard of the parameter."""
        first = self.bucket.shardings[member].shard[0]
        start, stop = unit.shards[self.bucket.rank]
        return slice(start - first, stop - first)

    def _start(self, unit: Unit) -> int:
        """Return the first element of this rank's piece in the unit."""
        return unit.shards[self.bucket.rank][0] - unit.start

    def _stop(self, unit: Unit) -> int:
        return unit.shards[self.bucket.rank][1] - unit.start


def _is_spread(unit: Unit) -> bool:
    return unit.only_rank is None and not unit.replicated


def neurons_per_matrix(unit: Unit) -> int:
    """Return the number of neurons, the outputs, of each matrix in a unit."""
    return unit.layout.fans(unit.shape)[0]


def neuron_sums(piece: Tensor, unit: Unit, start: int) -> Tensor:
    """Sum the elements that a piece has of each neuron.

    Args:
        piece: Shape (elements,).
        unit: The unit of the piece.
        start: The first element of the piece in the unit.

    Returns:
        Shape (neurons of all matrices in the unit,); zero for neurons of which the piece has no element.
    """
    rows, columns, parts = _touched(unit, start, start + piece.numel(), piece.device)
    margin = start % columns
    padded = pad(piece, (margin, parts.numel() * columns - margin - piece.numel())).view(-1, columns)
    if unit.layout.transposed:
        sums = padded.new_zeros(unit.shape[0], columns)
        return sums.index_add_(0, parts, padded).flatten()
    sums = padded.new_zeros(unit.shape[0] * unit.shape[1])
    sums[rows] = padded.sum(dim=1)
    return sums


def spread_over_neurons(values: Tensor, unit: Unit, start: int, stop: int) -> Tensor:
    """Return for each element of a piece the value of its neuron.

    Args:
        values: One for each neuron, in the order of :func:`neuron_sums`.
        unit: The unit of the piece.
        start: The first element of the piece in the unit.
        stop: The one behind its last.

    Returns:
        Shape (stop − start,).
    """
    rows, columns, parts = _touched(unit, start, stop, values.device)
    of_rows = values.view(-1, columns)[parts] if unit.layout.transposed else values[rows, None].expand(-1, columns)
    margin = start % columns
    return of_rows.reshape(-1)[margin : margin + stop - start]


def _touched(unit: Unit, start: int, stop: int, device: torch.device) -> tuple[slice, int, Tensor]:
    """Return the stored rows of which a piece has elements, their length, and the part of the unit that each is in."""
    columns = unit.numel // (unit.shape[0] * unit.shape[1])
    rows = slice(start // columns, -(-stop // columns))
    return rows, columns, torch.arange(rows.start, rows.stop, device=device) // unit.shape[1]
