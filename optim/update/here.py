"""The transport of matrices that are whole on this rank: none. Matrices of one shape are one batch."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_muon.optim.update.batches import batch_bound, bounded
from lightning_muon.optim.update.fixed_norm import fixed_norm_step
from lightning_muon.optim.update.muon import Hooks, MuonParameter, Stages, Steps, Transport
from lightning_muon.optim.update.normuon import Neurons, inputs_of, neuron_factors
from lightning_muon.optim.update.options import MuonOptions
from lightning_muon.optim.update.scale import nuclear_norm


class Here(Transport):
    """Transport nothing: the matrices are whole on this rank. Those of one shape are computed as one batch (b, m, n).

    The steps are one tensor (b, m, n) for each shape of each batch of parameters.

    Args:
        batches: Parameters with matrices of the same shapes, batch by batch, see :func:`same_shape_batches`.
    """

    def __init__(self, batches: Sequence[Sequence[MuonParameter]], options: MuonOptions, hooks: Hooks) -> None:
        super().__init__([p for batch in batches for p in batch], options, hooks)
        self.batches = batches
        # The fans of each shape of a batch, which all its parameters have.
        self._fans = [batch[0].layout.fans(batch[0].weight.shape) for batch in batches]

    @override
    def polar(
        self, sources: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Stages[tuple[Steps, list[Tensor] | None]]:
        yield from ()
        moving = self._moving(gradients)
        matrices = self.join(sources)
        del sources  # freed before the iteration, whose batch is to stay in the cache, see BATCH_ELEMENTS
        return self.factors(matrices, moving)

    def factors(self, matrices: Steps, moving: Steps) -> tuple[Steps, list[Tensor] | None]:
        """Return the polar factors of joined matrices, and the numbers (b, 1, 1) of :meth:`polar`.

        ``moving`` says which matrices of each batch move, shape (b,); the factors of others are zero.
        """
        factors = [
            self.orthogonalize(self._places(batch, shape), of_shape, moves, fans, batch[0].fans)
            for (batch, shape, fans), of_shape, moves in zip(self._shapes(), matrices, moving, strict=True)
        ]
        if self.needs_norms:
            return factors, [nuclear_norm(m, f) for m, f in zip(matrices, factors, strict=True)]
        return factors, [moves.view(-1, 1, 1).float() for moves in moving] if self.options["polar_first"] else None

    @override
    def normalize_neurons(self, steps: Steps) -> Steps:
        wide = [step.to(torch.promote_types(step.dtype, torch.float32)) for step in steps]
        squares = [
            step.square().sum(inputs_of(batch[0].layout))
            for (batch, *_), step in zip(self._shapes(), wide, strict=True)
        ]
        means = [square / fan_in for (*_, (_, fan_in)), square in zip(self._shapes(), squares, strict=True)]
        averages = []
        alike: defaultdict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, of_parameter in self.by_parameter(means):
            if p.mean_squares is not None:
                averages.append(Neurons(p.layout, p.weight.shape).by_shape(p.mean_squares))
                alike[p.options["neuron_beta"] or 0.0] += zip(averages[-1], of_parameter, strict=True)
        for beta, members in alike.items():
            old, new = map(list, zip(*members, strict=True))
            torch._foreach_lerp_(old, new, 1 - beta)
        joined = self._join_shapes(averages)
        factors = [neuron_factors(average, square) for average, square in zip(joined, squares, strict=True)]
        return [
            step * of_neurons.unsqueeze(inputs_of(batch[0].layout))
            for (batch, *_), step, of_neurons in zip(self._shapes(), wide, factors, strict=True)
        ]

    @override
    def scale(self, steps: Steps, numbers: list[Tensor]) -> Steps:
        return [step * number for step, number in zip(steps, numbers, strict=True)]

    @override
    def rest(self, steps: Steps, numbers: list[Tensor]) -> Steps:
        return [step * (number != 0) for step, number in zip(steps, numbers, strict=True)]

    @override
    def keep_norms(self, steps: Steps) -> Steps:
        weights = self.join([p.weight for p in self.batch])
        kept = []
        for (batch, *_), weight, step in zip(self._shapes(), weights, steps, strict=True):
            w, d = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (weight, step))
            norms = tuple((a * b).sum(dim=(-2, -1)) for a, b in ((w, w), (w, d), (d, d)))
            shrink, push = fixed_norm_step(norms, batch[0].options, w[0].numel())
            kept.append(w * shrink.view(-1, 1, 1) + d * push.view(-1, 1, 1))
        return kept

    @override
    def join(self, tensors: Sequence[Tensor]) -> Steps:
        return self._join_shapes([p.layout.matrices(tensor) for p, tensor in zip(self.batch, tensors, strict=True)])

    @override
    def split(self, steps: Steps) -> list[Tensor]:
        return [p.layout.restore(matrices, p.weight.shape) for p, matrices in self.by_parameter(steps)]

    def by_parameter(self, tensors: Sequence[Tensor]) -> Iterator[tuple[MuonParameter, tuple[Tensor, ...]]]:
        """Split the tensors (b, …) of all shapes, such as nuclear norms, into those of each parameter, by shape."""
        rest = iter(tensors)
        for batch, fans in zip(self.batches, self._fans, strict=True):
            counts = zip(*(p.layout.counts(p.weight.shape) for p in batch), strict=True)
            split = [next(rest).split(of_shape) for of_shape, _ in zip(counts, fans, strict=True)]
            yield from zip(batch, zip(*split, strict=True), strict=True)

    def join_numbers(self, numbers: Sequence[Tensor]) -> Steps:
        """Join the numbers of the matrices of each parameter into one tensor (b,) for each shape of a batch."""
        split = [n.split(p.layout.counts(p.weight.shape)) for p, n in zip(self.batch, numbers, strict=True)]
        return self._join_shapes(split)

    def _moving(self, gradients: Sequence[Tensor]) -> Steps:
        """Return for each shape of a batch which matrices have a gradient that is not all zero, shape (b,)."""
        single = [i for i, p in enumerate(self.batch) if p.layout.count(p.weight.shape) == 1]
        norms = magnitude_of_each([gradients[i] for i in single])
        found = {i: [norm] for i, norm in zip(single, norms, strict=True)}
        sums = [
            found[i] if i in found else magnitudes(p.layout.matrices(gradient))
            for i, (p, gradient) in enumerate(zip(self.batch, gradients, strict=True))
        ]
        return [of_shape != 0 for of_shape in self._join_shapes(sums)]

    def _join_shapes(self, by_parameter: Sequence[Sequence[Tensor]]) -> Steps:
        """Join what each parameter has for each of its shapes, (b, …), into one tensor for each shape of a batch."""
        rest = iter(by_parameter)
        of_batches = [[next(rest) for _ in batch] for batch in self.batches]
        of_shapes = [of_shape for of_batch in of_batches for of_shape in zip(*of_batch, strict=True)]
        return [torch.cat(of_shape) if len(of_shape) > 1 else of_shape[0] for of_shape in of_shapes]

    def _shapes(self) -> Iterator[tuple[Sequence[MuonParameter], int, tuple[int, int]]]:
        """Return each shape of each batch: the batch, the place among its shapes, and the fans."""
        for batch, of_batch in zip(self.batches, self._fans, strict=True):
            yield from ((batch, shape, fans) for shape, fans in enumerate(of_batch))

    def _places(self, batch: Sequence[MuonParameter], shape: int) -> tuple[list[str], list[int]]:
        """Return for the hooks the name of the parameter of each matrix of a shape, and its first element there."""
        if not self.hooks:
            return [], []
        found = [(p.name, first) for p in batch for first in p.firsts[shape]]
        return [name for name, _ in found], [first for _, first in found]


def magnitude_of_each(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return for each tensor a number (1,) that is zero only if all its elements are: it does not underflow."""
    if not tensors:
        return ()
    if all(tensor.is_cpu for tensor in tensors):  # where the extremes take a quarter of the time
        low, high = (torch.stack(ends) for ends in zip(*map(torch.aminmax, tensors), strict=True))
        found = torch.maximum(high, -low)
    else:
        found = torch.stack(torch._foreach_norm(list(tensors), 1))
    numbers: tuple[Tensor, ...] = found.split(1)
    return numbers


def magnitudes(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of the magnitudes of each matrix of batches (b, m, n), shape (b,) each."""
    return [torch.linalg.vector_norm(of_shape, ord=1, dim=(-2, -1)) for of_shape in matrices]


def same_shape_batches(
    parameters: Iterable[MuonParameter], batch_elements: int | None
) -> Iterator[list[MuonParameter]]:
    """Group parameters with matrices of the same shapes, way of storage, dtype and device into bounded batches.

    With ``fixed_norm`` those of a batch have the same options, since it needs their learning rate.
    """
    alike: defaultdict[Any, list[MuonParameter]] = defaultdict(list)
    for p in parameters:
        dtype = p.momentum.dtype if p.momentum is not None else None
        shapes = tuple(p.layout.fans(p.weight.shape))
        options = id(p.options) if p.options["fixed_norm"] is not None else None
        alike[p.weight.device, p.weight.dtype, dtype, p.layout.transposed, p.fans, shapes, options].append(p)
    for (device, *_), members in alike.items():
        yield from bounded(members, lambda p: p.weight.numel(), batch_bound(batch_elements, device))
