"""How large the updates of Muon's and of AdamW's groups are."""

import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole, is_number
from lightning_muon.callbacks.group_labels import LabelledGroup, labelled_groups
from lightning_muon.callbacks.limits import Limit, advice
from lightning_muon.callbacks.measures.applied_factors import ROUNDINGS
from lightning_muon.callbacks.monitor import StepMonitor, log_scalars
from lightning_muon.callbacks.muon_matrices import HALF, entry_norms, is_muon, own_names
from lightning_muon.callbacks.sampled_matrices import spread_evenly
from lightning_muon.callbacks.shards import Shard, find_shards, local_gradients, names_with_gradient, over_ranks, sizes
from lightning_muon.callbacks.step_options import StepOptions, is_decoupled


class UpdateRMSMonitor(StepMonitor):
    r"""Log how large an update is per unit of learning rate, for the groups of all optimizers.

    A step with learning rate :math:`\eta` and decoupled weight decay :math:`\lambda` is
    :math:`W' = (1 - \eta\lambda) W - \eta U`. ``update_rms/<group>`` is the root mean square of the entries of
    :math:`U`, found from the weights before and after, so that it holds for any optimizer. AdamW's is about 0.2;
    Muon's is what its scale makes it: 0.2 with Moonlight's, so that both can share a learning rate (Liu et al., "Muon
    is Scalable for LLM Training", 2025, arXiv:2502.16982, section 2.2). What the weights move by is :math:`\eta \cdot`
    ``update_rms``: where that of a Muon group and that of another differ by more than ``max_ratio``, one warning says
    so.

    Weights that are kept in half precision move by the rounded update. Left out are parameters that do not move: those
    without gradient, a learning rate of zero, a skipped step; and those that only decay, such as what lies below a head
    of zeros in the first step. Where the optimizer adds the decay to the gradient, as SGD does, it is part of
    :math:`U`.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log ``parameter_update_rms/<name>`` of each parameter of the sample too, or of those whose names
            match one of these patterns.
        sample: How many parameters of a group are copied for a step, spread evenly over those with a gradient.
        max_elements: How many entries of a parameter are copied, about; of larger ones every n-th row is.
        max_ratio: Warn where learning rate times update RMS differ by more than this factor between a Muon group and
            another, either way; null never warns.

    Raises:
        MisconfigurationException: If an argument is out of its range; at the start of training, if a pattern matches
            nothing, or the trainer has two of these.

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
        for name, value in (("sample", sample), ("max_elements", max_elements)):
            check_whole("UpdateRMSMonitor", name, value)
        if max_ratio is not None and not (is_number(max_ratio) and max_ratio >= 1):
            raise MisconfigurationException(
                f"UpdateRMSMonitor: max_ratio must be at least 1, or null for no limit, got {max_ratio!r}"
            )
        self.sample = sample
        self.max_elements = max_elements
        self.max_ratio = max_ratio
        self._limit = self._make_limit()
        self._measured: list[Measured] = []

    @override
    def watches(self, optimizer: Optimizer) -> bool:
        return any(group["params"] for group in optimizer.param_groups)

    @override
    def choices(self, trainer: Trainer) -> Iterable[str]:
        return [name for group in labelled_groups(trainer.optimizers) for name in self._parameters(group)]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._measured.clear()
        self._limit = self._make_limit()

    @override
    @torch.no_grad()
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Keep some weights of each group over the step."""
        trainer = pl_module.trainer
        options = StepOptions(optimizer)
        try:
            groups = [group for group in labelled_groups(trainer.optimizers) if group.optimizer is optimizer]
            parameters = [self._parameters(group) for group in groups]
            has_gradient = set(names_with_gradient(trainer, {n: p for group in parameters for n, p in group.items()}))
            names = [
                spread_evenly([name for name in group if name in has_gradient], self.sample, self._chosen)
                for group in parameters
            ]
            sampled = [[group[name] for name in chosen] for group, chosen in zip(parameters, names, strict=True)]
            shards = [
                [replace(shard, local=some_rows(shard.local, self.max_elements)) for shard in group]
                for group in (find_shards(trainer, weights) for weights in sampled)
            ]
            before = [[wide_copy(shard.local) for shard in group] for group in shards]
            gradients = [
                entry_norms(some_rows(gradient, self.max_elements) for gradient in local_gradients(weights))
                for weights in sampled
            ]
            yield
        finally:
            options.close()
        for group, chosen, held, old, gradient in zip(groups, names, shards, before, gradients, strict=True):
            lr, decay = float(options.lr(group.place)), float(options.weight_decay(group.place))
            if chosen and lr != 0:
                new = [shard.local for shard in held]
                steps = weight_steps(old, new)
                moved = entry_norms(steps)
                remove_decay(steps, old, lr * decay if is_decoupled(optimizer, group.group) else 0.0, group.group)
                self._measured.append(
                    Measured(group, lr, chosen, held, [entry_norms(steps), moved, gradient, entry_norms(old)])
                )

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured, self._measured = self._measured, []
        if not measured:
            return
        shards = [shard for of_group in measured for shard in of_group.shards]
        quantities = [torch.cat(norms) for norms in zip(*(of_group.norms for of_group in measured), strict=True)]
        found = over_ranks(trainer, shards, [*quantities, sizes(shards)])
        values = zip(*found.norm[:4].tolist(), found.sum[4].tolist(), shards, strict=True)
        of_groups: dict[str, float] = {}
        of_parameters: dict[str, float] = {}
        moves: defaultdict[bool, dict[str, float]] = defaultdict(dict)
        for group, lr, names, *_ in measured:
            squares, entries = 0.0, 0.0
            # The next group goes on behind these.
            for name, (norm, moved, gradient, weight, size, shard) in zip(names, values, strict=False):
                rounding = ROUNDINGS * torch.finfo(shard.local.dtype).eps * weight
                only_decayed = gradient == 0 and norm <= rounding
                if moved != 0 and not only_decayed:
                    of_parameters[name] = norm / lr / math.sqrt(size)
                    squares, entries = squares + (norm / lr) ** 2, entries + size
            if entries:
                of_groups[group.label] = math.sqrt(squares / entries)
                moves[is_muon(group.optimizer, group.group)][group.label] = lr * of_groups[group.label]
        self.warn_of_not_finite(trainer, "the update RMS", of_parameters)
        scalars = {f"update_rms/{label}": rms for label, rms in of_groups.items()}
        for name, rms in of_parameters.items():
            if self._chosen.takes(name):
                scalars[f"parameter_update_rms/{name}"] = rms
        log_scalars(trainer, scalars)
        self._limit.watch(trainer, ratios(moves[True], moves[False]))

    def _parameters(self, group: LabelledGroup) -> dict[str, Tensor]:
        """Return the parameters of a group by their names in the module."""
        own = own_names(group.label, group.group)
        params = group.group["params"]
        return {self._names.get(id(param), name): param for name, param in zip(own, params, strict=True)}

    def _make_limit(self) -> Limit:
        what = "learning rate · update RMS, as a ratio of groups,"
        return Limit("UpdateRMSMonitor", "max_ratio", self.max_ratio, what, advice("update_rms"))


class Measured(NamedTuple):
    """What was measured of a group in one step.

    Args:
        group: The group.
        lr: Its learning rate in the step.
        names: Of the n parameters that were looked at.
        shards: What this rank holds of them.
        norms: Of the updates times the learning rate, of the whole steps, of the gradients and of the weights, each of
            shape (n,).
    """

    group: LabelledGroup
    lr: float
    names: list[str]
    shards: list[Shard]
    norms: list[Tensor]


def some_rows(tensor: Tensor, max_elements: int) -> Tensor:
    """Return a view of every n-th row, from the first on, so that there are about so many elements at most."""
    return tensor[:: math.ceil(tensor.numel() / max_elements)] if tensor.numel() > max_elements else tensor


def wide_copy(tensor: Tensor) -> Tensor:
    """Return a copy, in float32 if the tensor has half precision."""
    return tensor.float() if tensor.dtype in HALF else tensor.clone()


def weight_steps(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    """Return by how much each weight became smaller, W − W', in the precision of ``before``."""
    if not before:
        return []
    return list(torch._foreach_sub(before, [new.to(old.dtype) for new, old in zip(after, before, strict=True)]))


def remove_decay(steps: list[Tensor], before: list[Tensor], decay: float, group: Mapping[str, Any]) -> None:
    """Take what decayed out of W − W' = ηU + ηλW, in place.

    Args:
        steps: W − W' of each weight.
        before: W.
        decay: ηλ.
        group: Whose ``cautious_weight_decay`` lets only those entries decay which U does not push outwards. These are
            those whose whole step has the sign of W or is zero, since the decay has that sign too.
    """
    if not decay:
        return
    if group.get("cautious_weight_decay"):
        before = [old * (step * old >= 0) for step, old in zip(steps, before, strict=True)]
    torch._foreach_sub_(steps, before, alpha=decay)


def ratios(muon: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    """Return by how much what the weights of a Muon group and of another move by differ, by a text that names both."""
    found: dict[str, float] = {}
    for one, other in ((a, b) for a in muon.items() for b in others.items()):
        (_, small), (_, large) = (less, more) = sorted((one, other), key=lambda move: move[1])
        if small > 0:
            found[f"{more[0]} ({large:.2g}) to {less[0]} ({small:.2g})"] = large / small
    return found
