"""The size of the updates of Muon's and of other groups."""

import itertools
import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole
from lightning_muon.callbacks.limits import Limit, advice
from lightning_muon.callbacks.logging import log_scalars
from lightning_muon.callbacks.matrices import labelled_groups
from lightning_muon.callbacks.measures.weight_steps import ROUNDINGS, GroupSample, StepOptions
from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.sampling import spread_evenly
from lightning_muon.callbacks.shards import names_with_gradient, over_ranks


class UpdateRMSMonitor(StepMonitor):
    r"""Log the size of the updates, per unit of learning rate, of the groups of all optimizers.

    A step with learning rate :math:`\eta` and decoupled weight decay :math:`\lambda` is
    :math:`W' = (1 - \eta\lambda) W - \eta U`.

    - ``update_rms/<group>``: root mean square of the entries of :math:`U`, computed from the weights before and after,
      so for any optimizer. AdamW's is about 0.2. Muon's depends on its scale: it is 0.2 with Moonlight's, so that both
      can share a learning rate (Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv:2502.16982, section 2.2).
    - ``effective_lr/<group>``: :math:`\eta \cdot` ``update_rms``, by how much a step changes a weight, which can be
      compared between groups and optimizers.
    - ``rate_ratio``: the largest ratio of these between a group that Muon updates and another.
    - ``angular_update/<group>``: :math:`\eta \lVert U \rVert / \lVert W \rVert`, mean of the sample: about the angle in
      radians, by which a step turns a matrix.
    - ``angular_equilibrium/<group>``: where it comes to rest if gradients are noise, :math:`\sqrt{2 \eta\lambda (1 -
      \beta) / (1 + \beta)}` with momentum :math:`\beta` (Kosson et al., "Rotational Equilibrium", 2023,
      arXiv:2305.17212), after about :math:`1 / (2 \eta\lambda)` steps; of groups with decoupled decay. Far above it
      the weights still grow, far below they shrink.
    - ``parameter_update_rms/<name>`` and ``parameter_angular_update/<name>``: the same for a parameter, see
      ``per_parameter``.

    Some entries of a sample of the parameters are copied for the step. Left out are parameters that do not move (no
    gradient, a learning rate of zero, a skipped step), and those that only decay, such as layers below a head of zeros
    in the first step. Weights in half precision move by the rounded update. If the optimizer adds the decay to the
    gradient, as SGD does, the decay is part of :math:`U`.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log the value of each parameter of the sample (true), or of those whose names match a pattern.
        sample: How many parameters of a group are measured, spread evenly over those with a gradient.
        max_elements: About how many entries of a parameter are copied: of larger parameters, every n-th row.
        max_ratio: Warn once if :math:`\eta \cdot` ``update_rms``, by which the weights move, differs by a larger factor
            between a group that Muon updates and another. Null: never.

    Raises:
        MisconfigurationException: If an argument is wrong, a pattern matches nothing, or the trainer has two of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import UpdateRMSMonitor
        >>> trainer = Trainer(callbacks=[UpdateRMSMonitor(every_n_steps=100)])
    """

    nothing_to_watch = "no optimizer has parameters, so there is nothing to measure."

    def __init__(
        self,
        every_n_steps: int | None = None,
        per_parameter: bool | Sequence[str] = False,
        sample: int = 4,
        max_elements: int = 1 << 17,
        max_ratio: float | None = 10.0,
    ) -> None:
        super().__init__(every_n_steps, per_parameter)
        check_whole("UpdateRMSMonitor", sample=sample, max_elements=max_elements)
        self.sample = sample
        self.max_elements = max_elements
        self.max_ratio = max_ratio
        self._limits = self.make_limits()  # which raises the error of a wrong argument

    @override
    def watches(self, optimizer: Optimizer) -> bool:
        return bool(labelled_groups([optimizer]))

    @override
    def choices(self, trainer: Trainer) -> Iterable[str]:
        return [
            name for group in labelled_groups(trainer.optimizers) for name, _ in group.named_parameters(self._names)
        ]

    @override
    @torch.no_grad()
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure the updates of some weights of each group."""
        trainer = pl_module.trainer
        samples: list[GroupSample] = []
        with closing(StepOptions(optimizer)) as options:
            groups = [group for group in labelled_groups(trainer.optimizers) if group.optimizer is optimizer]
            parameters = [dict(group.named_parameters(self._names)) for group in groups]
            moving = set(names_with_gradient(trainer, {n: p for group in parameters for n, p in group.items()}))
            for group, of_group in zip(groups, parameters, strict=True):
                names = spread_evenly([name for name in of_group if name in moving], self.sample, self._chosen)
                chosen = {name: of_group[name] for name in names}
                samples.append(GroupSample(trainer, group, chosen, self.max_elements))
            yield
        for sample in samples:
            sample.finish(options)
        self._measured += [sample for sample in samples if sample.norms]

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule, measured: list[GroupSample]) -> None:
        if not measured:
            return
        shards = [shard for sample in measured for shard in sample.shards]
        quantities = [torch.cat(norms) for norms in zip(*(sample.norms for sample in measured), strict=True)]
        found = over_ranks(trainer, shards, quantities)
        values = zip(*found.norm.tolist(), found.entries.tolist(), shards, strict=True)
        of_groups: dict[str, float] = {}
        of_parameters: dict[str, float] = {}
        angles: dict[str, float] = {}
        scalars: dict[str, float] = {}
        moves: defaultdict[bool, dict[str, float]] = defaultdict(dict)
        for sample in measured:
            group, lr, squares, entries = sample.group, sample.lr, 0.0, 0.0
            of_group: list[float] = []
            # Not strict: the values of the next group follow in the same iterator.
            for name, (norm, moved, gradient, weight, size, shard) in zip(sample.names, values, strict=False):
                rounding = ROUNDINGS * torch.finfo(shard.local.dtype).eps * weight
                only_decayed = gradient == 0 and norm <= rounding
                if moved != 0 and not only_decayed:
                    of_parameters[name] = norm / lr / math.sqrt(size)
                    squares, entries = squares + (norm / lr) ** 2, entries + size
                    if weight != 0:
                        angles[name] = norm / weight
                        of_group.append(angles[name])
            if entries:
                of_groups[group.label] = math.sqrt(squares / entries)
                moves[group.is_orthogonalized][group.label] = lr * of_groups[group.label]
                scalars[f"effective_lr/{group.label}"] = lr * of_groups[group.label]
            if of_group:
                scalars[f"angular_update/{group.label}"] = sum(of_group) / len(of_group)
                if sample.equilibrium is not None:
                    scalars[f"angular_equilibrium/{group.label}"] = sample.equilibrium
        self.warn_of_not_finite(trainer, "the update RMS", of_parameters)
        scalars |= {f"update_rms/{label}": rms for label, rms in of_groups.items()}
        for tag, named in (("parameter_update_rms", of_parameters), ("parameter_angular_update", angles)):
            scalars |= {f"{tag}/{name}": value for name, value in named.items() if self._chosen.takes(name)}
        apart = ratios(moves[True], moves[False])
        if apart:
            scalars["rate_ratio"] = max(apart.values())
        log_scalars(trainer, scalars)
        self._limits["update_rms"].watch(trainer, apart)

    @override
    def make_limits(self) -> dict[str, Limit]:
        what = "learning rate · update RMS, as a ratio of groups,"
        limit = Limit("UpdateRMSMonitor", "max_ratio", self.max_ratio, what, advice("update_rms"), smallest=1)
        return {"update_rms": limit}


def ratios(muon: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    """Return the ratios between the moves of Muon groups and of others, by a text that names both groups."""
    found: dict[str, float] = {}
    for pair in itertools.product(muon.items(), others.items()):
        (less, small), (more, large) = sorted(pair, key=lambda move: move[1])
        if small > 0:
            found[f"{more} ({large:.2g}) to {less} ({small:.2g})"] = large / small
    return found
