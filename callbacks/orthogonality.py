"""How far the polar factors that Muon applies are from orthogonal."""

import itertools
from collections.abc import Generator, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole, some
from lightning_muon.callbacks.logging import warn
from lightning_muon.callbacks.matrices import (
    has_factor_hook,
    muon_groups,
    muon_matrices,
    names_in_module,
    orthogonalizes,
)
from lightning_muon.callbacks.measures.polar_factors import AppliedFactors, FactorBatch, FactorMeter
from lightning_muon.callbacks.measures.singular_values import extreme_singular_values
from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.sampling import SampledParameter, sampled_matrices
from lightning_muon.callbacks.shards import names_with_gradient, worst_over_ranks
from lightning_muon.optim.update.state import HALF


class OrthogonalityMonitor(StepMonitor):
    r"""Log how far the applied polar factors are from orthogonal.

    Each quantity is logged as ``max``, ``mean`` and ``min`` over the matrices:

    - ``orthogonality_error/…``: :math:`\lVert O^\top O - I \rVert_F / \sqrt r` with the smaller side :math:`r`, the RMS
      deviation of the squared singular values from one. Exact factors have 0, those of Muon's five Newton–Schulz steps
      about 0.4; near 1 the update has lost its rank.
    - ``singular_value_min/…`` and ``singular_value_max/…``: the extreme singular values, from a few steps of Lanczos'
      iteration, which converges from inside. The largest is too small by about 3e-3, rarely by 0.03. The smallest is
      nearly exact where it stands apart, and up to 0.07 too large where the values reach zero densely. Up to a smaller
      side of 32 both are exact to 5e-4.

    **Optimizers with** ``register_orthogonalize_hook``, such as ``MuonAdamW``, pass their factors to the monitor in the
    steps that are measured; other steps cost nothing. Factors of zero are left out: of matrices that rest, because
    their gradient is zero.

    **For others**, a sample of the weights is copied before the step, and the factors are computed from how they moved,
    :math:`O = ((1 - \eta\lambda) W - W') / \eta s` with learning rate :math:`\eta`, decoupled weight decay
    :math:`\lambda` and scale :math:`s`. The scale of ``torch.optim.Muon`` is known; else :math:`O` is scaled to a mean
    squared singular value of one, so only the spread is meaningful. Weights in half precision, and those that FSDP1 has
    flattened, are left out, with a warning at the start. An optimizer orthogonalizes if its class, or a parent of it,
    has ``Muon``, ``Polar``, ``Dion`` or ``Scion`` in its name. For the rest, such as AdamW, nothing is logged.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log the value of each parameter too: of all (true), or of those whose names match a pattern. Of
            several matrices in a parameter, the worst counts.
        sample: How many parameters are copied for a step of an optimizer without the hook.
        max_elements: The largest parameter that is copied, in elements.

    Raises:
        MisconfigurationException: If an argument is wrong, a pattern matches nothing, or the trainer has two of these;
            in a step, if the optimizer passes a factor of an unknown parameter.

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
        check_whole("OrthogonalityMonitor", sample=sample, max_elements=max_elements)
        self.sample = sample
        self.max_elements = max_elements

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            if muon_groups([optimizer]) and not has_factor_hook(optimizer) and orthogonalizes(optimizer):
                self._warn_of_what_is_left_out(trainer, optimizer)

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        if has_factor_hook(optimizer):
            return self._measure_factors(optimizer)
        if orthogonalizes(optimizer):
            return self._measure_moves(pl_module.trainer, optimizer)
        return super().around_step(pl_module, optimizer)

    @override
    def report(
        self, trainer: Trainer, pl_module: LightningModule, measured: list[tuple[list[str], list[FactorBatch]]]
    ) -> None:
        """Combine the ranks: each matrix was orthogonalized on one of them."""
        names = list(dict.fromkeys(name for expected, _ in measured for name in expected))
        if not names:
            return
        rows = []
        for owners, errors, tridiagonals in itertools.chain.from_iterable(batches for _, batches in measured):
            smallest, largest = extreme_singular_values(tridiagonals.cpu()).unbind(1)
            values = torch.column_stack([errors.cpu(), -smallest, largest])  # the largest are the worst
            moving = largest != 0  # or NaN
            rows.append(([owner for owner, moves in zip(owners, moving, strict=True) if moves], values[moving]))
        worst = worst_over_ranks(trainer, names, rows, columns=3)
        self.log_summary(
            trainer,
            {
                "orthogonality_error": {name: error for name, (error, _, _) in worst.items()},
                "singular_value_min": {name: -smallest for name, (_, smallest, _) in worst.items()},
                "singular_value_max": {name: largest for name, (_, _, largest) in worst.items()},
            },
        )

    def _measure_factors(self, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure the factors that the optimizer passes to its hook."""
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
        self._measured.append((list(names.values()), meter.finish()))

    def _measure_moves(self, trainer: Trainer, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure how a few weights move."""
        sampled = self._sample(optimizer)
        if not sampled:
            return
        applied = AppliedFactors(optimizer, sampled)
        meter = FactorMeter()
        try:
            yield
            # After the step: at its beginning the module may still have dropped gradients.
            moving = names_with_gradient(trainer, {name: chosen.parameter for name, chosen in sampled.items()})
            for name, factors in applied.found(moving):
                meter.add([name] * len(factors), factors)
        finally:
            applied.close()
        self._measured.append((moving, meter.finish()))

    def _sample(self, optimizer: Optimizer) -> dict[str, SampledParameter]:
        # Half precision rounds the steps away.
        return sampled_matrices([optimizer], self._names, self.sample, self.max_elements, self._chosen, half=False)

    def _warn_of_what_is_left_out(self, trainer: Trainer, optimizer: Optimizer) -> None:
        who = f"OrthogonalityMonitor: {type(optimizer).__name__} does not hand out what it orthogonalizes"
        matrices = muon_matrices([optimizer], self._names)
        if rounded := [name for name, matrix in matrices.items() if matrix.dtype in HALF]:
            warn(
                trainer,
                f"{who}, and half precision rounds away what it did to {some(rounded)}: these are left out. Keep the"
                " weights in float32 (precision bf16-mixed) to see them.",
            )
        elif not self._sample(optimizer):
            warn(
                trainer,
                f"{who}, and none of its matrices is whole, as under FSDP2, and has at most"
                f" max_elements={self.max_elements} elements, so there is no orthogonality_error to log.",
            )
