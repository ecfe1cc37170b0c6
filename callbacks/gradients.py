"""Condition number and stable rank of gradient and momentum: the anisotropy that orthogonalization removes."""

import itertools
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole
from lightning_muon.callbacks.logging import warn
from lightning_muon.callbacks.matrices import muon_matrices
from lightning_muon.callbacks.measures.experts import ExpertGradients, balances, expert_gradients
from lightning_muon.callbacks.measures.singular_values import condition_and_stable_rank, tridiagonals, unit_grams
from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.sampling import SampledParameter, sampled_matrices
from lightning_muon.callbacks.shards import any_over_ranks, names_with_gradient, whole, worst_over_ranks
from lightning_muon.optim.sharding.dtensor import is_dtensor

# A measurement takes as long as those of several other monitors, and its values change slowly.
LOGS_TO_A_MEASUREMENT = 10

# The momentum in the state of Muon, SGD and MuonAdamW; of AdamW, Adam, …
MOMENTA = ("momentum_buffer", "exp_avg")

# Of a step: the names of the sample on all ranks; and for each batch of matrices their owners, "gradient" or "momentum"
# and a name, and their tridiagonals; and the gradients of experts.
Measurement = tuple[list[str], list[tuple[list[tuple[str, str]], Tensor]], ExpertGradients | None]


class GradientMonitor(StepMonitor):
    r"""Log condition number and stable rank of the gradient and of the momentum, for a sample of Muon's matrices.

    Each quantity is logged as ``max``, ``mean`` and ``min`` over the sample, to about 1 %:

    - ``gradient_condition_log10/…`` and ``momentum_condition_log10/…``: :math:`\log_{10} \kappa` of the condition
      number :math:`\kappa = \sigma_{\max} / \sigma_{\min}`, the anisotropy, which slows plain gradient descent and
      which the polar factor removes (Lau et al., "PolarGrad", 2025, arXiv:2505.21799). At most 7, where float32 does
      not resolve the smallest singular value: rank is lost.
    - ``gradient_stable_rank/…`` and ``momentum_stable_rank/…``: :math:`\lVert G \rVert_F^2 / \sigma_{\max}^2`, the
      number of directions that carry the gradient, from 1 to the smaller side (Rudelson and Vershynin, "Sampling from
      large matrices", 2007).
    - ``expert_balance/…``, of all layers with experts: the RMS of the least of the experts' gradients over their mean,
      1 where all are trained alike, 0 where one got no token; where there are none, nothing.

    All are independent of the scale of the matrix. The gradient is the one before clipping, the momentum the one after
    the step. Of several matrices in a parameter the worst counts. Left out are matrices of zeros, those that FSDP1 has
    flattened, and momenta that no rank holds as a whole, such as those of fused projections with ``shard_state``.

    Args:
        every_n_steps: How often to measure. Default: ten times the trainer's ``log_every_n_steps``.
        per_parameter: Log the value of each matrix of the sample too (true), or of those whose names match a pattern.
        sample: How many parameters of an optimizer are measured, spread evenly over the model.
        max_elements: Larger parameters are left out; the time grows with the cube of the smaller side.

    Raises:
        MisconfigurationException: If an argument is wrong, a pattern matches nothing, or the trainer has two of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import GradientMonitor
        >>> trainer = Trainer(callbacks=[GradientMonitor(every_n_steps=500)])
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        per_parameter: bool | Sequence[str] = False,
        sample: int = 4,
        max_elements: int = 1 << 20,
    ) -> None:
        super().__init__(every_n_steps, per_parameter)
        check_whole("GradientMonitor", sample=sample, max_elements=max_elements)
        self.sample = sample
        self.max_elements = max_elements

    @override
    def cadence(self, trainer: Trainer) -> int:
        return self.every_n_steps or LOGS_TO_A_MEASUREMENT * super().cadence(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if muon_matrices(trainer.optimizers, self._names) and not self._sample(*trainer.optimizers):
            warn(
                trainer,
                f"GradientMonitor: none of Muon's matrices is whole and has at most max_elements={self.max_elements}"
                " elements, so there is no condition number to log. FSDP1 flattens them: take FSDP2 to see them.",
            )

    @override
    @torch.no_grad()
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure the gradients before the step, and the momenta after it."""
        trainer = pl_module.trainer
        chosen = self._sample(optimizer)
        has_gradient = names_with_gradient(trainer, {name: one.parameter for name, one in chosen.items()})
        sample = {name: chosen[name] for name in has_gradient}
        experts = expert_gradients(trainer, optimizer, self._names)
        gradients = unit_grams_of(trainer, sample, {name: one.parameter.grad for name, one in sample.items()})
        yield
        found = {name: momentum_of(optimizer, one.parameter) for name, one in sample.items()}
        momenta = unit_grams_of(trainer, sample, found)
        # One batch for each side: with small matrices the calls take more time than the arithmetic.
        batches: defaultdict[tuple[int, torch.device], list[tuple[str, str, Tensor]]] = defaultdict(list)
        for kind, grams in (("gradient", gradients), ("momentum", momenta)):
            for name, gram in grams:
                batches[gram.shape[-1], gram.device].append((kind, name, gram))
        measured = []
        for batch in batches.values():
            owners = [(kind, name) for kind, name, gram in batch for _ in gram]
            measured.append((owners, tridiagonals(torch.cat([gram for *_, gram in batch]))))
        self._measured.append((list(sample), measured, experts))

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule, measured: list[Measurement]) -> None:
        """Combine the ranks: with a sharded state a momentum is on one of them."""
        for *_, experts in measured:
            if experts is not None:
                self.log_summary(trainer, {"expert_balance": balances(trainer, experts)})
        kinds = ("gradient", "momentum")
        expected = [(kind, name) for kind in kinds for names, *_ in measured for name in names]
        if not expected:
            return
        rows = []
        for owners, projected in itertools.chain.from_iterable(batches for _, batches, _ in measured):
            condition, rank = condition_and_stable_rank(projected.cpu()).unbind(1)
            worst = torch.column_stack([condition.log10(), -rank])  # the largest are the worst
            rows.append((owners, worst.masked_fill(condition.unsqueeze(1) == 0, -torch.inf)))  # no matrices of zeros
        found = worst_over_ranks(trainer, expected, rows, columns=2)
        self.log_summary(
            trainer,
            {
                f"{kind}_{quantity}": {name: abs(values[i]) for (of, name), values in found.items() if of == kind}
                for kind in kinds
                for i, quantity in enumerate(("condition_log10", "stable_rank"))
            },
        )

    def _sample(self, *optimizers: Optimizer) -> dict[str, SampledParameter]:
        return sampled_matrices(optimizers, self._names, self.sample, self.max_elements, self._chosen)


def momentum_of(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Return the momentum of a parameter; None if this rank does not hold all that it holds of the parameter."""
    # MuonAdamW may store it in fewer bytes.
    state_of = getattr(optimizer, "state_of", None) or optimizer.state.__getitem__
    state: Mapping[str, Tensor | None] = state_of(parameter) if parameter in optimizer.state else {}
    momentum = next((state[name] for name in MOMENTA if state.get(name) is not None), None)
    # With a sharded state it is flat, and on some ranks only.
    return momentum.view_as(parameter) if momentum is not None and momentum.numel() == parameter.numel() else None


def unit_grams_of(
    trainer: Trainer, sample: Mapping[str, SampledParameter], tensors: Mapping[str, Tensor | None]
) -> list[tuple[str, Tensor]]:
    """Return the :func:`unit_grams` (b, r, r) of the matrices in tensors that exist, with their names. A collective.

    A name occurs once for each shape of the matrices in its parameter.

    Args:
        trainer: The trainer with the ranks.
        sample: Parameters by name.
        tensors: Each is laid out as its parameter. A DTensor is left out if any rank lacks it.
    """
    sharded = [name for name, one in sample.items() if is_dtensor(one.parameter)]
    missing = any_over_ranks(trainer, [(tensor := tensors[name]) is None or not is_dtensor(tensor) for name in sharded])
    left_out = {name for name, is_missing in zip(sharded, missing, strict=True) if is_missing}
    present = {name: whole(tensor) for name, tensor in tensors.items() if tensor is not None and name not in left_out}
    return [(name, unit_grams(same)) for name, tensor in present.items() for same in sample[name].matrices(tensor)]
