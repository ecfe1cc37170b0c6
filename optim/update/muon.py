"""The update rule of Muon, once for all ways in which parameters live on ranks."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_muon.optim.polar.orthogonalize import orthogonalize
from lightning_muon.optim.update.cautious import decaying
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.optim.update.options import MuonOptions
from lightning_muon.optim.update.scale import scale_factor
from lightning_muon.optim.update.state import HALF, Average, read_together, save_together

Result = TypeVar("Result")
# A stage of a distributed step pauses (yields None) while something is on its way.
Stages = Generator[None, None, Result]
# The steps of a batch in the form of its transport: see Transport.join and Transport.split.
Steps = list[Tensor]
# A parameter and the direction of its step.
Applied = tuple["MuonParameter", Tensor]


class OrthogonalizeHook(Protocol):
    """A function that takes polar factors, see ``MuonAdamW.register_orthogonalize_hook``."""

    def __call__(self, names: list[str], factors: Tensor, /) -> None:
        """Take the polar factors (b, m, n) of a batch, and the name of the parameter of each."""


class SourceHook(Protocol):
    """A function that takes what is orthogonalized, see ``MuonAdamW.register_orthogonalize_pre_hook``."""

    def __call__(self, names: list[str], firsts: list[int], matrices: Tensor, /) -> None:
        """Take the matrices (b, m, n) of a batch, and of each the parameter and its first element there."""


@dataclass(frozen=True)
class Hooks:
    """Functions that see each batch of matrices: ``before`` it is orthogonalized, and ``after``."""

    before: Sequence[SourceHook] = ()
    after: Sequence[OrthogonalizeHook] = ()

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self.before or self.after)


@dataclass(frozen=True)
class MuonParameter:
    """The elements of a parameter that this rank updates, with gradient and state.

    Args:
        name: Its name, for hooks.
        layout: Where the matrices are in the whole parameter.
        fans: Fan-out and fan-in of its matrices; of those of its first shape, if it has several.
        options: The options of its group.
        weight: The weights W, in the shape of the whole parameter or of this rank's shard.
        gradient: The gradient G, of the shape of ``weight``; ``None`` if there is none: then nothing is updated.
        momentum: The moving average M of gradients, or of polar factors with ``polar_first``; ``None`` without one.
        mean_squares: With ``neuron_beta``, the moving average of the mean square of each neuron's step, shape
            (neurons,); the mean is over the elements of this rank.
        start: Where some matrices of a parameter are updated by themselves, their first element in it.
    """

    name: str
    layout: MatrixLayout
    fans: tuple[int, int]
    options: MuonOptions
    weight: Tensor
    gradient: Tensor | None
    momentum: Average | None
    mean_squares: Tensor | None = None
    start: int = 0

    @property
    def firsts(self) -> list[list[int]]:
        """The first element of each matrix in the whole parameter, for each shape."""
        return [[self.start + first for first in of_shape] for of_shape in self.layout.firsts(self.weight.shape)]


class Transport(ABC):
    """Bring the matrices of a batch together, orthogonalize them, and bring the factors back.

    Args:
        batch: The parameters.
        options: The options of their group.
        hooks: Functions that are called with what this rank orthogonalizes, and with the polar factors.
    """

    def __init__(self, batch: Sequence[MuonParameter], options: MuonOptions, hooks: Hooks) -> None:
        self.batch = batch
        self.options = options
        self.hooks = hooks

    @abstractmethod
    def polar(self, sources: Sequence[Tensor], gradients: Sequence[Tensor]) -> Stages[tuple[Steps, Any]]:
        """Return the polar factors of the matrices in ``sources``, and a number of each if the step needs it.

        The factor of a matrix whose gradient is all zero is zero: it rests, whatever its momentum. The number is the
        nuclear norm if the scale needs it; else, with ``polar_first``, zero for a matrix that rests.
        """

    @abstractmethod
    def normalize_neurons(self, steps: Steps) -> Steps:
        """Update the moving average of each neuron's mean square, and apply :func:`neuron_factors` to the neurons."""

    @abstractmethod
    def scale(self, steps: Steps, numbers: Any) -> Steps:
        """Multiply the step of each matrix by its number of :meth:`polar`."""

    @abstractmethod
    def rest(self, steps: Steps, numbers: Any) -> Steps:
        """Return zero for the step of each matrix whose number of :meth:`polar` is zero, others as they are."""

    @abstractmethod
    def keep_norms(self, steps: Steps) -> Steps:
        """Return the steps that keep the norm of each matrix, see :func:`fixed_norm_step`."""

    def average(self, new: Sequence[Tensor]) -> list[Tensor]:
        """Update the momentum M ← μM + (1 − μ)X; return M, or with Nesterov's look-ahead (1 − μ)X + μM.

        Where a parameter has no gradient, X is returned.
        """
        momenta = self.read_momenta()
        averages = list(new)
        alike: defaultdict[float, list[tuple[int, Tensor]]] = defaultdict(list)
        for i, (p, momentum) in enumerate(zip(self.batch, momenta, strict=True)):
            if momentum is not None:
                alike[p.options["momentum"]].append((i, momentum))
        for mu, members in alike.items():
            places, of_places = map(list, zip(*members, strict=True))
            arrived = [x if x.dtype == m.dtype else x.to(m.dtype) for x, m in ((new[i], m) for i, m in members)]
            torch._foreach_lerp_(of_places, arrived, 1 - mu)
            found = torch._foreach_lerp(arrived, of_places, mu) if self.options["nesterov"] else of_places
            for i, tensor in zip(places, found, strict=True):
                averages[i] = tensor
        self.save_momenta(momenta)
        return averages

    def read_momenta(self) -> list[Tensor | None]:
        """Return the momentum of each parameter, ``None`` where it has none, to be updated in place."""
        return read_together([p.momentum for p in self.batch])

    def save_momenta(self, momenta: Sequence[Tensor | None]) -> None:
        """Store the momenta that :meth:`read_momenta` returned."""
        save_together([p.momentum for p in self.batch], momenta, [p.gradient for p in self.batch])

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
        return [(p, step) for p, step in moving if p.gradient is not None]

    @property
    def needs_norms(self) -> bool:
        """Whether the nuclear norm scales the step; with ``fixed_norm`` no scale has an effect."""
        return self.options["update_scale"] == "nuclear_norm" and self.options["fixed_norm"] is None

    def orthogonalize(
        self,
        places: tuple[list[str], list[int]],
        matrices: Tensor,
        moving: Tensor,
        fans: tuple[int, int],
        reference: tuple[int, int],
    ) -> Tensor:
        """Return the polar factors of matrices (b, m, n), after the hooks.

        Args:
            places: For the hooks, the name of the parameter of each matrix, and its first element there.
            matrices: The matrices.
            moving: Whether each of them moves, shape (b,); the factors of others are zero.
            fans: Fan-out and fan-in of the matrices.
            reference: Those of the first matrices of their parameter, whose scale the step of the parameter gets. So
                the factors are multiplied by the ratio of the scales.
        """
        options = self.options
        for before in self.hooks.before:
            before(*places, matrices)
        # The result of Nesterov's look-ahead is a copy. It may be overwritten unless the nuclear norm still needs it.
        is_copy = options["nesterov"] and not options["polar_first"] and not self.needs_norms
        factors = orthogonalize(
            matrices,
            options["orthogonalizer"],
            # The check would wait for the device. A gradient that is not finite spoils only its own matrix.
            check_finite=False,
            compile=options["compile"],
            out=matrices if is_copy else None,
            mask=moving,
            **options["orthogonalizer_options"],
        )
        for after in self.hooks.after:
            after(places[0], factors)
        if fans == reference:
            return factors
        own, of_parameter = (scale_factor(options["update_scale"], *f) for f in (fans, reference))
        return factors if own == of_parameter else factors * (own / of_parameter)


def muon_step(transport: Transport) -> Stages[None]:
    """Update a batch of parameters in place by one step of Muon; see :class:`~lightning_muon.optim.MuonAdamW`."""
    batch, options = transport.batch, transport.options
    gradients = [torch.zeros_like(p.weight) if p.gradient is None else p.gradient for p in batch]
    # The sources are not kept in a variable here, so that the transport can free them.
    if options["polar_first"]:
        factors, numbers = yield from transport.polar(gradients, gradients)
        # The average of factors goes on after the gradient has ended.
        steps = transport.rest(transport.join(transport.average(transport.split(factors))), numbers)
    else:
        steps, numbers = yield from transport.polar(transport.average(gradients), gradients)
    if options["neuron_beta"] is not None:
        steps = transport.normalize_neurons(steps)
    if transport.needs_norms:
        steps = transport.scale(steps, numbers)
    if options["fixed_norm"] is not None:
        steps = transport.keep_norms(steps)
    apply_steps((yield from transport.deliver(steps)))


def run(step: Stages[None]) -> None:
    """Run a step that waits for no other rank."""
    for _ in step:
        pass


def apply_steps(moving: Iterable[Applied]) -> None:
    """Apply steps D: W ← (1 − lr·wd)·W − lr·scale·D, rounded once, since 1.0·(1 − 1e-4) is 1.0 in bfloat16.

    With ``fixed_norm`` the step is applied as it is, W ← W − D.
    """
    alike: defaultdict[tuple[float, float, bool], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    sizes: dict[Any, tuple[float, float, bool]] = {}
    for p, step in moving:
        key = id(p.options), p.fans
        if key not in sizes:
            sizes[key] = _sizes(p.options, p.fans)
        alike[sizes[key]].append((p.weight, step))
    for (size, decay, cautious), members in alike.items():
        weights, steps = map(list, zip(*members, strict=True))
        wide = [weight.float() if weight.dtype in HALF else weight for weight in weights]
        if cautious:
            torch._foreach_sub_(wide, decaying(wide, steps), alpha=decay)
        elif decay:
            torch._foreach_mul_(wide, 1 - decay)
        torch._foreach_add_(wide, steps, alpha=-size)
        for weight, new in zip(weights, wide, strict=True):
            if new is not weight:
                weight.copy_(new)


def _sizes(options: MuonOptions, fans: tuple[int, int]) -> tuple[float, float, bool]:
    """Return what multiplies a step, what decays the weights, and whether the decay is cautious."""
    if options["fixed_norm"] is not None:
        return 1.0, 0.0, False
    lr = options["lr"]
    size = lr * scale_factor(options["update_scale"], *fans)
    return size, lr * options["weight_decay"], options["cautious_weight_decay"]
