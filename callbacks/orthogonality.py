"""How far the polar factors that Muon applies are from orthogonal."""

import itertools
import math
from collections.abc import Generator, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole, some
from lightning_muon.callbacks.logging import logged_step, warn
from lightning_muon.callbacks.matrices import (
    has_factor_hook,
    muon_groups,
    muon_matrices,
    names_in_module,
    orthogonalizes,
)
from lightning_muon.callbacks.measures.polar_factors import AppliedFactors, FactorBatch, FactorMeter
from lightning_muon.callbacks.measures.singular_values import extreme_singular_values
from lightning_muon.callbacks.measures.sources import Place, SourceMeter
from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.operator_map import OperatorMap, is_due
from lightning_muon.callbacks.sampling import SampledParameter, sampled_matrices
from lightning_muon.callbacks.shards import names_with_gradient, worst_over_ranks
from lightning_muon.optim.update.state import HALF

# What measures nothing, outside of the steps of a map.
NO_SOURCES = SourceMeter((), lambda _: False)


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

    Now and then they become a map: ``operator_error/<operator>``, the mean over depth of what has the same place in
    each layer, ``needed_steps/<operator>``, the most steps that a matrix of it needs until its smallest singular value
    is in the healthy range, and both by depth as the text ``orthogonality_map``, which ``MuonDashboard`` draws.

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
        max_elements: The largest parameter that is copied, and whose needed steps are found, in elements.

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
        self._map: OperatorMap | None = None
        self._draws = self._is_last = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._map = None
        for optimizer in trainer.optimizers:
            if muon_groups([optimizer]) and not has_factor_hook(optimizer) and orthogonalizes(optimizer):
                self._warn_of_what_is_left_out(trainer, optimizer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.measures_now(trainer):
            step, every = logged_step(trainer) + 1, self.cadence(trainer)
            self._is_last = 0 < trainer.max_steps < step + every
            self._draws = self._is_last or is_due(step // every)

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        if has_factor_hook(optimizer):
            return self._measure_factors(pl_module.trainer, optimizer)
        if orthogonalizes(optimizer):
            return self._measure_moves(pl_module.trainer, optimizer)
        return super().around_step(pl_module, optimizer)

    @override
    def report(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        measured: list[tuple[list[str], list[FactorBatch], SourceMeter]],
    ) -> None:
        """Combine the ranks: each matrix was orthogonalized on one of them."""
        names = list(dict.fromkeys(name for expected, *_ in measured for name in expected))
        if not names:
            return
        rows = []
        errors_of: dict[Place, float] = {}
        for places, errors, tridiagonals in itertools.chain.from_iterable(batches for _, batches, _ in measured):
            smallest, largest = extreme_singular_values(tridiagonals.cpu()).unbind(1)
            values = torch.column_stack([errors.cpu(), -smallest, largest])  # the largest are the worst
            moving = largest != 0  # or NaN
            kept = [place for place, moves in zip(places, moving, strict=True) if moves]
            rows.append(([name for name, _ in kept], values[moving]))
            for place, error in zip(kept, errors.cpu()[moving].tolist(), strict=True):
                errors_of[place] = max(error, errors_of.get(place, error), key=lambda e: (math.isnan(e), e))
        worst = worst_over_ranks(trainer, names, rows, columns=3)
        self.log_summary(
            trainer,
            {
                "orthogonality_error": {name: error for name, (error, _, _) in worst.items()},
                "singular_value_min": {name: -smallest for name, (_, smallest, _) in worst.items()},
                "singular_value_max": {name: largest for name, (_, _, largest) in worst.items()},
            },
        )
        if self._draws and self._map is not None:
            self._draws = False
            sigmas = {place: value for *_, sources in measured for place, value in sources.finish().items()}
            self._map.add(trainer, errors_of, sigmas)

    def _sources(self, trainer: Trainer) -> SourceMeter:
        """Return what measures the matrices before they are orthogonalized, in the steps of a map."""
        if not self._draws:
            return NO_SOURCES
        if self._map is None:
            self._map = OperatorMap(trainer.optimizers, self._names, self.max_elements)
        return self._map.sources(is_last=self._is_last)

    def _measure_factors(self, trainer: Trainer, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure the factors that the optimizer passes to its hook."""
        names = names_in_module(optimizer, self._names)
        meter, sources = FactorMeter(), self._sources(trainer)
        next_firsts: list[int] = []  # of the batch that comes next

        def see(owners: list[str], firsts: list[int], matrices: Tensor) -> None:
            next_firsts[:] = firsts
            sources.add(
                [(names.get(owner, owner), first) for owner, first in zip(owners, firsts, strict=True)], matrices
            )

        def measure(owners: list[str], factors: Tensor) -> None:
            if unknown := [owner for owner in owners if owner not in names]:
                raise MisconfigurationException(
                    f"OrthogonalityMonitor: {type(optimizer).__name__} has handed out {some(unknown)} through"
                    f" register_orthogonalize_hook, but the param_names of its Muon groups are {some(list(names))}."
                )
            firsts: Sequence[int | None] = next_firsts or [None] * len(owners)
            meter.add([(names[owner], first) for owner, first in zip(owners, firsts, strict=True)], factors)
            next_firsts.clear()

        handles = [optimizer.register_orthogonalize_hook(measure)]  # type: ignore[attr-defined]
        if self._draws and hasattr(optimizer, "register_orthogonalize_pre_hook"):
            handles.append(optimizer.register_orthogonalize_pre_hook(see))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._measured.append((list(names.values()), meter.finish(), sources))

    def _measure_moves(self, trainer: Trainer, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure how a few weights move."""
        sampled = self._sample(optimizer)
        if not sampled:
            return
        applied = AppliedFactors(optimizer, sampled)
        meter, sources = FactorMeter(), self._sources(trainer)
        try:
            yield
            # After the step: at its beginning the module may still have dropped gradients.
            moving = names_with_gradient(trainer, {name: chosen.parameter for name, chosen in sampled.items()})
            for name, factors in applied.found(moving):
                meter.add([(name, None)] * len(factors), factors)
        finally:
            applied.close()
        self._measured.append((moving, meter.finish(), sources))

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
