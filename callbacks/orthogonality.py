"""How far what Muon applied is from orthogonal."""

import math
from collections.abc import Generator, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole
from lightning_muon.callbacks.measures.applied_factors import AppliedFactors, fitting_sample, orthogonalizes
from lightning_muon.callbacks.measures.extreme_singular_values import extreme_singular_values
from lightning_muon.callbacks.measures.polar_factors import FactorMeter, Measured
from lightning_muon.callbacks.monitor import StepMonitor, warn
from lightning_muon.callbacks.muon_matrices import HALF, muon_groups, muon_matrices, names_in_module
from lightning_muon.callbacks.name_choice import some
from lightning_muon.callbacks.shards import largest_over_ranks, names_with_gradient


class OrthogonalityMonitor(StepMonitor):
    r"""Log how far the applied polar factors are from orthogonal.

    ``orthogonality_error/…`` is :math:`\lVert O^\top O - I \rVert_F / \sqrt r` with the smaller side :math:`r`, the
    RMS deviation of the squared singular values from one, as ``max``, ``mean`` and ``min`` over the matrices. Zero is
    exact; the five steps of Newton–Schulz that Muon takes give about 0.4; near one, the update has lost its rank.
    ``singular_value_min/…`` and ``singular_value_max/…`` are the extreme singular values, found by a few steps of
    Lanczos' iteration, always from inside: the largest is too small by about 3e-3, in rare cases by 0.03; the smallest
    is nearly exact where it stands apart, and up to 0.07 too large where the values go down densely to zero. Up to a
    smaller side of 32 both are exact to 5e-4.

    It reads what the optimizer hands out through ``register_orthogonalize_hook``, in the steps that it logs and in no
    others. Of an optimizer without that hook, such as ``torch.optim.Muon``, a sample of the weights is copied before
    the step, and what was orthogonalized is found from how they moved: :math:`O = ((1 - \eta\lambda) W - W') / \eta s`
    with learning rate :math:`\eta`, decoupled weight decay :math:`\lambda` and scale :math:`s`. The scale of
    ``torch.optim.Muon`` is known; of others :math:`O` is scaled so that its mean squared singular value is one, so that
    only the spread of the values counts. Weights in half precision do not show their step, nor do those that FSDP has
    flattened; these are left out, and one is told at the start. Of the other optimizers in ``torch.optim``, which
    orthogonalize nothing, nothing is logged.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log each matrix too, under its parameter's name; or only those that match one of these patterns.
            Of several matrices in one parameter it is the worst.
        sample: How many parameters are copied for a step of an optimizer that does not hand out what it orthogonalizes.
        max_elements: The largest parameter that is copied, in elements.

    Raises:
        MisconfigurationException: If an argument is out of its range; at the start of training, if a pattern matches
            nothing, or the trainer has two of these; in a step, if the optimizer hands out what is none of its own.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import OrthogonalityMonitor
        >>> trainer = Trainer(callbacks=[OrthogonalityMonitor(every_n_steps=100)])
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        per_parameter: bool | Sequence[str] = False,
        sample: int = 8,
        max_elements: int = 1 << 24,
    ) -> None:
        super().__init__(every_n_steps, per_parameter)
        for argument, value in (("sample", sample), ("max_elements", max_elements)):
            check_whole("OrthogonalityMonitor", argument, value)
        self.sample = sample
        self.max_elements = max_elements
        self._measured: list[Measured] = []
        self._expected: list[str] = []  # of all that may be orthogonalized, on whatever rank

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._measured.clear()
        self._expected.clear()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            if muon_groups(optimizer) and not hands_out(optimizer) and orthogonalizes(optimizer):
                self._tell_what_is_left_out(trainer, optimizer)

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        if hands_out(optimizer):
            return self._listen(optimizer)
        if orthogonalizes(optimizer):
            return self._compare(pl_module.trainer, optimizer)
        return super().around_step(pl_module, optimizer)

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the values together: each matrix is orthogonalized on one rank, which may have had none."""
        names, self._expected = list(dict.fromkeys(self._expected)), []
        measured, self._measured = self._measured, []
        if not names:
            return
        # By name: the error, minus the smallest and the largest singular value; the largest of each counts.
        worst = {name: [-math.inf] * 3 for name in names}
        for owners, errors, tridiagonals in measured:
            extremes = extreme_singular_values(tridiagonals.cpu())
            values = torch.column_stack([errors.cpu(), -extremes[:, 0], extremes[:, 1]])
            for owner, found in zip(owners, values.tolist(), strict=True):
                worst[owner] = [larger(*pair) for pair in zip(worst[owner], found, strict=True)]
        everywhere = largest_over_ranks(trainer, torch.tensor(list(worst.values()), dtype=torch.float64)).tolist()
        seen = {name: values for name, values in zip(names, everywhere, strict=True) if values[0] != -math.inf}
        self.log_summary(
            trainer,
            {
                "orthogonality_error": {name: error for name, (error, _, _) in seen.items()},
                "singular_value_min": {name: -smallest for name, (_, smallest, _) in seen.items()},
                "singular_value_max": {name: largest for name, (_, _, largest) in seen.items()},
            },
        )

    def _listen(self, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure what the optimizer hands out."""
        names = names_in_module(optimizer, self._names)
        meter = FactorMeter()

        def measure(owners: list[str], factors: Tensor) -> None:
            if unknown := [owner for owner in owners if owner not in names]:
                raise MisconfigurationException(
                    f"OrthogonalityMonitor: {type(optimizer).__name__} has handed out {some(unknown)} through"
                    f" register_orthogonalize_hook, but the param_names of its Muon groups are {some(list(names))}."
                )
            meter.add([names[owner] for owner in owners], factors)

        handle = optimizer.register_orthogonalize_hook(measure)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            handle.remove()
        self._expected += names.values()
        self._measured += meter.finish()

    def _compare(self, trainer: Trainer, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure how a few weights have moved."""
        sampled = fitting_sample(optimizer, self._names, self.sample, self.max_elements, self._chosen)
        if not sampled:
            return
        applied = AppliedFactors(optimizer, sampled)
        meter = FactorMeter()
        try:
            yield
            # Only now: the module may yet have dropped some when the step began.
            moving = names_with_gradient(trainer, {name: chosen.parameter for name, chosen in sampled.items()})
            for name, factors in applied.found(moving).items():
                meter.add([name] * len(factors), factors)
        finally:
            applied.close()
        self._expected += moving
        self._measured += meter.finish()

    def _tell_what_is_left_out(self, trainer: Trainer, optimizer: Optimizer) -> None:
        who = f"OrthogonalityMonitor: {type(optimizer).__name__} does not hand out what it orthogonalizes"
        matrices = muon_matrices([optimizer], self._names)
        if rounded := [name for name, matrix in matrices.items() if matrix.dtype in HALF]:
            warn(
                trainer,
                f"{who}, and half precision rounds away what it did to {some(rounded)}: these are left out. Keep the"
                " weights in float32 (precision bf16-mixed) to see them.",
            )
        elif not fitting_sample(optimizer, self._names, self.sample, self.max_elements, self._chosen):
            warn(
                trainer,
                f"{who}, and none of its matrices is whole, as under FSDP2, and has at most"
                f" max_elements={self.max_elements} elements, so there is no orthogonality_error to log.",
            )


def hands_out(optimizer: Optimizer) -> bool:
    """Whether an optimizer hands out what it orthogonalizes."""
    return hasattr(optimizer, "register_orthogonalize_hook")


def larger(one: float, other: float) -> float:
    """Return the larger of two numbers; NaN if one is."""
    return other if other > one or math.isnan(other) else one
