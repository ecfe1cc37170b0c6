"""The transport to owners: each matrix is orthogonalized by one rank, whatever shards of it the ranks have."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_muon.optim.sharding.buckets import Bucket
from lightning_muon.optim.sharding.exchange import UnitNumbers, gather, scatter, wire_dtype
from lightning_muon.optim.sharding.pieces import (
    in_zeros,
    matrix_sums,
    neuron_sizes,
    neuron_sums,
    neurons_of,
    repeated,
    spread_over_neurons,
)
from lightning_muon.optim.update.fixed_norm import fixed_norm_step
from lightning_muon.optim.update.here import Here, magnitude_of_each, magnitudes, same_shape_batches
from lightning_muon.optim.update.muon import Hooks, MuonParameter, Stages, Steps, Transport
from lightning_muon.optim.update.normuon import neuron_factors
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
    def polar(self, sources: Sequence[Tensor], gradients: Sequence[Tensor]) -> Stages[tuple[Steps, UnitNumbers | None]]:
        dtype = wire_dtype(sources[0], self.options)
        units, moving = yield from gather(self.bucket, sources, self._moving(gradients), dtype)
        factors, numbers = self._orthogonalize_owned(units, moving)
        shards, numbers = yield from scatter(self.bucket, factors, numbers, dtype, sources[0].device)
        # A factor has the dtype of the momentum, as on one device.
        return [
            shard.view(p.weight.shape).to(state_dtype("momentum_buffer", p.weight, p.options["momentum_dtype"]))
            for p, shard in zip(self.batch, shards, strict=True)
        ], numbers

    @override
    def normalize_neurons(self, steps: Steps) -> Steps:
        sums = []
        seen: defaultdict[int, int] = defaultdict(int)
        for piece in self.bucket.here:
            p = self.batch[piece.member]
            elements = self.bucket.take(piece, steps)
            squares = neuron_sums(elements.to(torch.promote_types(elements.dtype, torch.float32)).square(), piece)
            numbers, part = neuron_sizes(piece, squares.device, squares.dtype)
            averages = squares / numbers.clamp_min(1)  # of this rank's elements
            if p.mean_squares is not None and piece.numel:
                first = seen[piece.member]
                seen[piece.member] += averages.numel()
                stored = p.mean_squares[first : first + averages.numel()]
                averages = stored.lerp_(averages, 1 - (p.options["neuron_beta"] or 0.0))
            sums.append(torch.stack([averages * part, squares]))
        self._all_reduce([s for s, p in zip(sums, self.bucket.here, strict=True) if p.unit.is_split])
        factors: UnitNumbers = {}
        for piece, (averages, squares) in zip(self.bucket.here, sums, strict=True):
            by_shape = neurons_of(piece.unit).by_shape
            found = map(neuron_factors, by_shape(averages), by_shape(squares))
            factors[piece.key] = torch.cat([of_shape.flatten() for of_shape in found])
        return self._multiply(steps, factors)

    @override
    def scale(self, steps: Steps, numbers: UnitNumbers) -> Steps:
        return self._multiply(steps, {p.key: repeated(numbers[p.key], p.unit) for p in self.bucket.here if p.numel})

    @override
    def rest(self, steps: Steps, numbers: UnitNumbers) -> Steps:
        return self.scale(steps, {key: of_matrices != 0 for key, of_matrices in numbers.items()})

    @override
    def keep_norms(self, steps: Steps) -> Steps:
        weights = [p.weight for p in self.batch]
        sums = []
        for piece in self.bucket.here:
            w, d = (
                t.to(torch.promote_types(t.dtype, torch.float32))
                for t in (self.bucket.take(piece, weights), self.bucket.take(piece, steps))
            )
            sums.append(torch.stack([matrix_sums(product, piece) for product in (w * w, w * d, d * d)]))
        self._all_reduce([s for s, p in zip(sums, self.bucket.here, strict=True) if p.unit.is_split])
        shrink: UnitNumbers = {}
        push: UnitNumbers = {}
        for piece, (square, product, step_square) in zip(self.bucket.here, sums, strict=True):
            options, unit = self.batch[piece.member].options, piece.unit
            elements = [fan_out * fan_in for fan_out, fan_in in unit.fans]
            split = (numbers.split(unit.counts) for numbers in (square, product, step_square))
            found = [fixed_norm_step(of_shape, options, n) for *of_shape, n in zip(*split, elements, strict=True)]
            shrink[piece.key], push[piece.key] = (repeated(torch.cat(n), unit) for n in zip(*found, strict=True))
        shrunk, pushed = self._multiply(weights, shrink), self._multiply(steps, push)
        return [w + d for w, d in zip(shrunk, pushed, strict=True)]

    def _moving(self, gradients: Sequence[Tensor]) -> UnitNumbers:
        """Return for each piece of this rank which matrices have a gradient there that is not all zero, (matrices,)."""
        pieces = [piece for piece in self.bucket.here if piece.numel]
        taken = {piece.key: self.bucket.take(piece, gradients) for piece in pieces}
        single = [piece.key for piece in pieces if piece.unit.count == 1]
        norms = magnitude_of_each([taken[key] for key in single])
        found = {key: norm != 0 for key, norm in zip(single, norms, strict=True)}
        for piece in pieces:
            if piece.key not in found:
                matrices = piece.unit.layout.matrices(in_zeros(taken[piece.key], piece))
                found[piece.key] = torch.cat(magnitudes(matrices)) != 0
        return found

    def _orthogonalize_owned(
        self, units: Sequence[Tensor], moving: Sequence[Tensor]
    ) -> tuple[list[Tensor], UnitNumbers | None]:
        """Orthogonalize the units that this rank owns, matrices of one shape as one batch."""
        owned = self.bucket.owned
        as_parameters = [
            replace(self.batch[m], layout=u.layout, weight=elements.view(u.shape), momentum=None, start=u.start)
            for (m, u), elements in zip(owned, units, strict=True)
        ]
        moves = {id(p): of_unit for p, of_unit in zip(as_parameters, moving, strict=True)}
        # A replicated unit without gradient has none on any rank.
        with_gradient = [
            p for p, (_, u) in zip(as_parameters, owned, strict=True) if p.gradient is not None or not u.replicated
        ]
        here = Here(list(same_shape_batches(with_gradient, sys.maxsize)), self.options, self.hooks)
        polar, numbers = here.factors(
            here.join([p.weight for p in here.batch]), here.join_numbers([moves[id(p)] for p in here.batch])
        )
        found = {id(p): factor.reshape(-1) for p, factor in zip(here.batch, here.split(polar), strict=True)}
        factors = [
            found[id(p)] if id(p) in found else torch.zeros_like(e) for p, e in zip(as_parameters, units, strict=True)
        ]
        if numbers is None:
            return factors, None
        of_units = {id(p): torch.cat([n.flatten() for n in by_shape]) for p, by_shape in here.by_parameter(numbers)}
        return factors, {
            (m, u.start): of_units.get(id(p), e.new_zeros(u.count))
            for (m, u), p, e in zip(owned, as_parameters, units, strict=True)
        }

    def _multiply(self, steps: Steps, numbers_of: UnitNumbers) -> Steps:
        """Multiply the elements of each shard by the numbers of their neurons."""
        numbers: list[list[Tensor]] = [[] for _ in steps]
        for p in self.bucket.here:
            if p.numel:
                numbers[p.member].append(spread_over_neurons(numbers_of[p.key], p))
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
