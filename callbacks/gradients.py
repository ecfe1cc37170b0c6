"""How unevenly the gradient and the momentum of Muon's matrices stretch: what orthogonalization takes away."""

from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole
from lightning_muon.callbacks.measures.anisotropy import condition_and_stable_rank, tridiagonals, unit_grams
from lightning_muon.callbacks.monitor import StepMonitor, warn
from lightning_muon.callbacks.muon_matrices import muon_matrices
from lightning_muon.callbacks.sampled_matrices import Sampled, matrices_in, sampled_matrices, whole
from lightning_muon.callbacks.shards import largest_over_ranks, names_with_gradient

# Measuring takes the time of several other monitors, and what is measured changes slowly.
LOGS_TO_A_MEASUREMENT = 10

# Where Muon, SGD and MuonAdamW keep their momentum; and AdamW, Adam, …
MOMENTA = ("momentum_buffer", "exp_avg")

QUANTITIES = ("condition", "stable_rank")


class GradientMonitor(StepMonitor):
    r"""Log condition number and stable rank of the gradient and of the momentum, for a sample of Muon's matrices.

    - ``gradient_condition/…`` and ``momentum_condition/…``: :math:`\kappa = \sigma_{\max} / \sigma_{\min}`, the
      gradient anisotropy that the polar factor takes away and that slows plain gradient descent (Lau et al.,
      "PolarGrad", 2025, arXiv:2505.21799). It ends at 1e7, where float32 no longer resolves the smallest singular
      value: 1e7 says that rank is lost.
    - ``gradient_stable_rank/…`` and ``momentum_stable_rank/…``: :math:`\lVert G \rVert_F^2 / \sigma_{\max}^2`, the
      number of directions that carry the gradient, from 1 to the smaller side (Rudelson and Vershynin, "Sampling from
      large matrices", 2007).

    Each comes as ``max``, ``mean`` and ``min`` over the sample, to about 1 %. Both stay the same when the matrix is
    scaled. The gradient is that before clipping; the momentum, where the optimizer keeps one, that after the step. Of
    several matrices in a parameter the worst counts: the largest κ, the smallest rank. Left out are matrices of zeros,
    those that FSDP1 has flattened, and momenta of which no rank has the whole, as ``shard_state`` splits those of fused
    projections.

    Args:
        every_n_steps: How often to measure. Default: ten times the trainer's ``log_every_n_steps``.
        per_parameter: Log each matrix of the sample too, or those whose names match one of these patterns.
        sample: How many parameters of an optimizer are looked at, spread evenly over the model.
        max_elements: Larger parameters are left out; the time grows with the cube of the smaller side.

    Raises:
        MisconfigurationException: If an argument is out of its range; at the start of training, if a pattern matches
            nothing, or the trainer has two of these.

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
        for name, value in (("sample", sample), ("max_elements", max_elements)):
            check_whole("GradientMonitor", name, value)
        self.sample = sample
        self.max_elements = max_elements
        self._names_measured: list[str] = []
        self._measured: list[Measured] = []

    @override
    def cadence(self, trainer: Trainer) -> int:
        return self.every_n_steps or LOGS_TO_A_MEASUREMENT * super().cadence(trainer)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._names_measured.clear()
        self._measured.clear()

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
        """Take the Gram matrices of the gradients before the step, and of the momenta after it."""
        trainer = pl_module.trainer
        sample = self._sample(optimizer)
        has_gradient = names_with_gradient(trainer, {name: one.parameter for name, one in sample.items()})
        sample = {name: sample[name] for name in has_gradient}
        gradients = {name: one.parameter.grad for name, one in sample.items()}
        grams = gram_matrices(sample, complete(trainer, sample, gradients))
        yield
        momenta = {name: momentum_of(optimizer, one.parameter) for name, one in sample.items()}
        grams_after = gram_matrices(sample, complete(trainer, sample, momenta))
        self._names_measured += sample
        # One batch for each side, since small matrices take more time to start than to compute.
        batches: defaultdict[tuple[int, torch.device], list[tuple[str, str, Tensor]]] = defaultdict(list)
        for kind, of_kind in (("gradient", grams), ("momentum", grams_after)):
            for name, gram in of_kind.items():
                batches[gram.shape[-1], gram.device].append((kind, name, gram))
        for batch in batches.values():
            owners = [(kind, name) for kind, name, gram in batch for _ in gram]
            self._measured.append(Measured(owners, tridiagonals(torch.cat([gram for *_, gram in batch]))))

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the values together: with a sharded state a momentum is on one rank only."""
        names, self._names_measured = self._names_measured, []
        measured, self._measured = self._measured, []
        if not names:
            return
        columns = [(kind, quantity) for kind in ("gradient", "momentum") for quantity in QUANTITIES]
        # By matrix: condition numbers and minus the ranks, so that the largest of each is the worst.
        worst = torch.full((len(names), len(columns)), -torch.inf, dtype=torch.float64)
        places = {name: place for place, name in enumerate(names)}
        for owners, projected in measured:
            values = condition_and_stable_rank(projected.cpu()) * torch.tensor([1.0, -1.0], dtype=torch.float64)
            for (kind, name), value in zip(owners, values, strict=True):
                if value[0] != 0:  # else a matrix of zeros
                    column = columns.index((kind, QUANTITIES[0]))
                    there = worst[places[name], column : column + 2]
                    there.copy_(torch.maximum(there, value))  # NaN is largest
        worst = largest_over_ranks(trainer, worst)
        self.log_summary(
            trainer,
            {
                f"{kind}_{quantity}": {
                    name: abs(value) for name, value in zip(names, found, strict=True) if value != -torch.inf
                }
                for (kind, quantity), found in zip(columns, worst.T.tolist(), strict=True)
            },
        )

    def _sample(self, *optimizers: Optimizer) -> dict[str, Sampled]:
        return sampled_matrices(optimizers, self._names, self.sample, self.max_elements, self._chosen)


class Measured(NamedTuple):
    """What was measured of a batch of matrices, on their device.

    Args:
        owners: For each, ``"gradient"`` or ``"momentum"`` and the name of the parameter.
        projected: Their :func:`tridiagonals`.
    """

    owners: list[tuple[str, str]]
    projected: Tensor


def momentum_of(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Return the momentum that an optimizer keeps for a parameter, if this rank holds as much of it as of that."""
    state: Mapping[str, Tensor | None] = optimizer.state.get(parameter, {})
    momentum = next((state[name] for name in MOMENTA if state.get(name) is not None), None)
    # A sharded state is flat, and belongs to some ranks only.
    return momentum.view_as(parameter) if momentum is not None and momentum.numel() == parameter.numel() else None


def complete(
    trainer: Trainer, sample: Mapping[str, Sampled], tensors: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Return tensors with the shards of all ranks, without those that are missing. A collective of all ranks.

    Args:
        trainer: Knows the ranks.
        sample: The parameters.
        tensors: By the same names, laid out as the parameters. One that is sharded is left out if any rank lacks it.
    """
    sharded = [name for name, one in sample.items() if isinstance(one.parameter, DTensor)]
    lacking: set[str] = set()
    if sharded:
        here = torch.tensor([float(not isinstance(tensors[name], DTensor)) for name in sharded])
        anywhere = largest_over_ranks(trainer, here).tolist()
        lacking = {name for name, lacks in zip(sharded, anywhere, strict=True) if lacks}
    return {name: whole(tensor) for name, tensor in tensors.items() if tensor is not None and name not in lacking}


def gram_matrices(sample: Mapping[str, Sampled], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the :func:`unit_grams` of the matrices in whole tensors, shape (b, r, r) each, by name."""
    return {name: unit_grams(matrices_in(tensor, **sample[name].layout)) for name, tensor in tensors.items()}
