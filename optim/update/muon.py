"""The update rule of Muon, once for all ways in which parameters live on ranks."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_muon.optim.polar.orthogonalize import orthogonalize
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.optim.update.options import MuonOptions
from lightning_muon.optim.update.scale import nuclear_norm, scale_factor
from lightning_muon.optim.update.state import HALF

# Elements in a batch of matrices unless an option sets them: enough to keep a GPU busy with small matrices; on a CPU so
# few that what is computed from them stays in its cache (measured by benchmarks/optimizer_step.py).
BATCH_ELEMENTS = {"cpu": 1 << 20}
BATCH_ELEMENTS_ELSEWHERE = 1 << 24
# Keeps a neuron that never had an update from being divided by zero; arXiv:2510.05491, algorithm 1.
NEURON_EPS = 1e-8

Item = TypeVar("Item")
Result = TypeVar("Result")
# A stage of a distributed step pauses (yields None) while something is on its way.
Stages = Generator[None, None, Result]
# The steps of a batch in the form of its transport: see Transport.join and Transport.split.
Steps = list[Tensor]
# Weights, the fan-out and fan-in of their matrices, and the direction of their step.
Applied = tuple[Tensor, tuple[int, int], Tensor]


class OrthogonalizeHook(Protocol):
    """A function that takes polar factors, see ``MuonAdamW.register_orthogonalize_hook``."""

    def __call__(self, names: list[str], factors: Tensor, /) -> None:
        """Take the polar factors (b, m, n) of a batch, and the name of the parameter of each."""


Hooks = Sequence[OrthogonalizeHook]


@dataclass(frozen=True)
class MuonParameter:
    """The elements of a parameter that this rank updates, with gradient and state.

    Args:
        name: Its name, for hooks.
        layout: Where the matrices are in the whole parameter.
        fans: Fan-out and fan-in of its matrices; of those of its first shape, if it has several.
        weight: The weights W, in the shape of the whole parameter or of this rank's shard.
        gradient: The gradient G, of the shape of ``weight``; ``None`` if there is none: then nothing is updated.
        momentum: The moving average M of gradients, or of polar factors with ``polar_first``; ``None`` without one.
        mean_square: With ``neuron_beta``, the moving average of the squares of its steps, of the shape of ``weight``.
    """

    name: str
    layout: MatrixLayout
    fans: tuple[int, int]
    weight: Tensor
    gradient: Tensor | None
    momentum: Tensor | None
    mean_square: Tensor | None = None


class Transport(ABC):
    """Bring the matrices of a batch together, orthogonalize them, and bring the factors back.

    Args:
        batch: The parameters.
        options: The options of their group.
        hooks: Functions that are called with the polar factors that this rank computes.
    """

    def __init__(self, batch: Sequence[MuonParameter], options: MuonOptions, hooks: Hooks) -> None:
        self.batch = batch
        self.options = options
        self.hooks = hooks

    @abstractmethod
    def polar(self, sources: Sequence[Tensor]) -> Stages[tuple[Steps, Any]]:
        """Return the polar factors of the matrices in ``sources``, and their nuclear norms if the scale needs them."""

    @abstractmethod
    def normalize_neurons(self, steps: Steps, mean_squares: Sequence[Tensor]) -> Steps:
        """Apply :func:`neuron_factors` to the neurons of each matrix."""

    @abstractmethod
    def scale(self, steps: Steps, norms: Any) -> Steps:
        """Multiply the step of each matrix by its nuclear norm."""

    def join(self, tensors: Sequence[Tensor]) -> Steps:
        """Bring one tensor for each parameter, shaped as its weight, into the form in which steps are computed."""
        return list(tensors)

    def split(self, steps: Steps) -> list[Tensor]:
        """Undo :meth:`join`."""
        return steps

    def deliver(self, steps: Steps) -> Stages[list[Applied]]:
        """Return the weights on this rank that move, each with its step."""
        yield from ()
        moving = zip(self.batch, self.split(steps), strict=True)
        return [(p.weight, p.fans, step) for p, step in moving if p.gradient is not None]

    @property
    def needs_norms(self) -> bool:
        """Whether the update scale is the nuclear norm."""
        return self.options["update_scale"] == "nuclear_norm"

    def orthogonalize(
        self, names: list[str], matrices: Tensor, fans: tuple[int, int], reference: tuple[int, int]
    ) -> Tensor:
        """Return the polar factors of matrices (b, m, n), after the hooks; ``names`` has one name for each matrix.

        The step of a parameter is scaled as its first matrices need, whose fans are ``reference``. So the factors of
        others, whose own ``fans`` differ, are multiplied by the ratio of the scales.
        """
        options = self.options
        # The result of Nesterov's look-ahead is a copy. It may be overwritten unless the nuclear norm still needs it.
        is_copy = options["nesterov"] and not options["polar_first"] and not self.needs_norms
        factors = orthogonalize(
            matrices,
            options["orthogonalizer"],
            # The check would wait for the device. A gradient that is not finite spoils only its own matrix.
            check_finite=False,
            compile=options["compile"],
            out=matrices if is_copy else None,
            **options["orthogonalizer_options"],
        )
        for hook in self.hooks:
            hook(names, factors)
        if fans == reference:
            return factors
        own, of_parameter = (scale_factor(options["update_scale"], *f) for f in (fans, reference))
        return factors if own == of_parameter else factors * (own / of_parameter)


def muon_step(transport: Transport) -> Stages[None]:
    """Update a batch of parameters in place by one step of Muon; see :class:`~lightning_muon.optim.MuonAdamW`."""
    batch, options = transport.batch, transport.options
    gradients = [torch.zeros_like(p.weight) if p.gradient is None else p.gradient for p in batch]
    polar_first = options["polar_first"]
    # The sources are not kept in a variable here, so that the transport can free them.
    steps, norms = yield from transport.polar(gradients if polar_first else average(batch, gradients, options))
    if polar_first:
        steps = transport.join(average(batch, transport.split(steps), options))
    if options["neuron_beta"] is not None:
        mean_squares = average_squares(batch, transport.split(steps), options["neuron_beta"])
        steps = transport.normalize_neurons(steps, mean_squares)
    if transport.needs_norms:
        steps = transport.scale(steps, norms)
    apply_steps((yield from transport.deliver(steps)), options)


def run(step: Stages[None]) -> None:
    """Run a step that waits for no other rank."""
    for _ in step:
        pass


def average(batch: Sequence[MuonParameter], new: Sequence[Tensor], options: MuonOptions) -> list[Tensor]:
    """Average: M ← μM + (1 − μ)X in place; return M, or with Nesterov's look-ahead (1 − μ)X + μM.

    Where a parameter has no gradient, X is returned.
    """
    averages = list(new)
    moving = [(i, p.momentum) for i, p in enumerate(batch) if p.momentum is not None]
    if moving:
        places, momenta = map(list, zip(*moving, strict=True))
        arrived = [new[i].to(m.dtype) for i, m in moving]
        torch._foreach_lerp_(momenta, arrived, 1 - options["momentum"])
        found = torch._foreach_lerp(arrived, momenta, options["momentum"]) if options["nesterov"] else momenta
        for i, tensor in zip(places, found, strict=True):
            averages[i] = tensor
    return averages


def average_squares(batch: Sequence[MuonParameter], steps: Sequence[Tensor], beta: float) -> list[Tensor]:
    """Average: V ← βV + (1 − β)D² in place for steps D; return V, or D² where a parameter has no gradient."""
    squares = []
    for p, step in zip(batch, steps, strict=True):
        if p.mean_square is None:
            squares.append(step.float().square())
        else:
            squares.append(p.mean_square.lerp_(step.to(p.mean_square.dtype).square(), 1 - beta))
    return squares


def neuron_factors(mean_squares: Tensor, squares: Tensor) -> Tensor:
    """Return the number that multiplies the update of each neuron.

    Polar factors have singular values near one, but rows of very different norms. Dividing row i by √vᵢ, where v is the
    moving average of the mean square of row i, makes the rows alike. The Frobenius norm of each matrix stays what it
    was, so that the update scale means the same with and without.

    Source: Li et al., "NorMuon" (2025), arXiv:2510.05491, algorithm 1.

    Args:
        mean_squares: Moving averages of the mean square of each neuron's step, this step included, shape (b, neurons).
        squares: The sum of the squares of each neuron's step, shape (b, neurons), which is also that of the result.
    """
    factors = 1 / (mean_squares.sqrt() + NEURON_EPS)
    size, new_size = (s.sum(dim=-1, keepdim=True).sqrt() for s in (squares, squares * factors**2))
    scaled: Tensor = factors * (size / new_size.clamp_min(torch.finfo(torch.float32).tiny))
    return scaled


def apply_steps(moving: Iterable[Applied], options: MuonOptions) -> None:
    """Apply steps D: W ← (1 − lr·wd)·W − lr·scale·D, rounded once, since 1.0·(1 − 1e-4) is 1.0 in bfloat16."""
    lr, decay = options["lr"], options["lr"] * options["weight_decay"]
    alike: defaultdict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for weight, fans, step in moving:
        alike[scale_factor(options["update_scale"], *fans)].append((weight, step))
    for scale, members in alike.items():
        weights, steps = map(list, zip(*members, strict=True))
        wide = [weight.float() if weight.dtype in HALF else weight for weight in weights]
        if options["cautious_weight_decay"]:
            inwards = [weight * (step * weight >= 0) for weight, step in zip(wide, steps, strict=True)]
            torch._foreach_sub_(wide, inwards, alpha=decay)
        elif decay:
            torch._foreach_mul_(wide, 1 - decay)
        torch._foreach_add_(wide, steps, alpha=-lr * scale)
        for weight, new in zip(weights, wide, strict=True):
            if new is not weight:
                weight.copy_(new)


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
    def polar(self, sources: Sequence[Tensor]) -> Stages[tuple[Steps, list[Tensor] | None]]:
        yield from ()
        matrices = self.join(sources)
        del sources  # freed before the iteration, whose batch is to stay in the cache, see BATCH_ELEMENTS
        factors = [
            self.orthogonalize(self._names(batch, shape), of_shape, fans, batch[0].fans)
            for (batch, shape, fans), of_shape in zip(self._shapes(), matrices, strict=True)
        ]
        norms = [nuclear_norm(m, f) for m, f in zip(matrices, factors, strict=True)] if self.needs_norms else None
        return factors, norms

    @override
    def normalize_neurons(self, steps: Steps, mean_squares: Sequence[Tensor]) -> Steps:
        normalized = []
        for (batch, *_), step, squares in zip(self._shapes(), steps, self.join(mean_squares), strict=True):
            inputs = -2 if batch[0].layout.transposed else -1  # the dimension over which a neuron extends
            wide = step.to(squares.dtype)
            factors = neuron_factors(squares.mean(inputs), wide.square().sum(inputs))
            normalized.append(wide * factors.unsqueeze(inputs))
        return normalized

    @override
    def scale(self, steps: Steps, norms: list[Tensor]) -> Steps:
        return [step * norm for step, norm in zip(steps, norms, strict=True)]

    @override
    def join(self, tensors: Sequence[Tensor]) -> Steps:
        rest = iter(tensors)
        matrices = [[p.layout.matrices(tensor) for p, tensor in zip(b, rest, strict=False)] for b in self.batches]
        of_shapes = [of_shape for of_batch in matrices for of_shape in zip(*of_batch, strict=True)]
        return [torch.cat(of_shape) if len(of_shape) > 1 else of_shape[0] for of_shape in of_shapes]

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

    def _shapes(self) -> Iterator[tuple[Sequence[MuonParameter], int, tuple[int, int]]]:
        """Return each shape of each batch: the batch, the place among its shapes, and the fans."""
        for batch, of_batch in zip(self.batches, self._fans, strict=True):
            yield from ((batch, shape, fans) for shape, fans in enumerate(of_batch))

    def _names(self, batch: Sequence[MuonParameter], shape: int) -> list[str]:
        return [p.name for p in batch for _ in range(p.layout.counts(p.weight.shape)[shape])] if self.hooks else []


def same_shape_batches(
    parameters: Iterable[MuonParameter], batch_elements: int | None
) -> Iterator[list[MuonParameter]]:
    """Group parameters with matrices of the same shapes, way of storage, dtype and device into bounded batches."""
    alike: defaultdict[Any, list[MuonParameter]] = defaultdict(list)
    for p in parameters:
        dtype = p.momentum.dtype if p.momentum is not None else None
        shapes = tuple(p.layout.fans(p.weight.shape))
        alike[p.weight.device, p.weight.dtype, dtype, p.layout.transposed, p.fans, shapes].append(p)
    for (device, *_), members in alike.items():
        yield from bounded(members, lambda p: p.weight.numel(), batch_bound(batch_elements, device))


def batch_bound(batch_elements: int | None, device: torch.device) -> int:
    """Return the number of elements in a batch on a device: the option, or the default of the device."""
    return batch_elements or BATCH_ELEMENTS.get(device.type, BATCH_ELEMENTS_ELSEWHERE)


def bounded(items: Iterable[Item], elements: Callable[[Item], int], most_elements: int) -> Iterator[list[Item]]:
    """Cut items into runs of at most ``most_elements``; an item that is larger is a run by itself."""
    run: list[Item] = []
    total = 0
    for item in items:
        if run and total + elements(item) > most_elements:
            yield run
            run, total = [], 0
        run.append(item)
        total += elements(item)
    if run:
        yield run
