"""Steps of weights: the learning rate, the decay and the update in what a step changed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.matrices import LabelledGroup
from lightning_muon.callbacks.shards import entry_norms, find_shards, local_gradients, over_ranks
from lightning_muon.optim.update.state import HALF

# More than about a hundredth of a step that is smaller than this many roundings of the weights is rounding.
ROUNDINGS = 128

# Optimizers of torch that add the decay to the gradient, although their groups do not say so.
COUPLED = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.RMSprop,
)


class StepOptions:
    """Learning rates and weight decays as the next step of an optimizer uses them.

    Create it in ``on_before_optimizer_step``: after the step, post-hooks may have restored the groups, and schedulers
    may have gone on. Without a gradient scaler the step's pre-hooks, which may set another weight decay, have run by
    then. With a scaler they run later, so the options are read again after all pre-hooks that are registered already.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._read(optimizer)
        self._handle = optimizer.register_step_pre_hook(self._read)

    def lr(self, place: int) -> float | Tensor:
        """Return the learning rate of a group by its index in ``param_groups``; 1 if it has none."""
        return self._options[place][0]

    def weight_decay(self, place: int) -> float | Tensor:
        """Return the weight decay of a group by its index in ``param_groups``; 0 if it has none."""
        return self._options[place][1]

    def close(self) -> None:
        """Remove the hook. The options stay."""
        self._handle.remove()

    def _read(self, optimizer: Optimizer, *_: Any) -> None:
        self._options = [
            (_copied(group.get("lr", 1.0)), _copied(group.get("weight_decay", 0.0))) for group in optimizer.param_groups
        ]


def _copied(option: float | Tensor) -> float | Tensor:
    return option.detach().clone() if isinstance(option, Tensor) else option  # schedulers change tensors in place


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether weights decay by ηλW beside the update, not by an addition to the gradient."""
    return bool(group.get("decoupled_weight_decay", not isinstance(optimizer, COUPLED)))


def some_rows(tensor: Tensor, max_elements: int) -> Tensor:
    """Return a view of every n-th row, from the first on, with at most about ``max_elements`` elements."""
    return tensor[:: math.ceil(tensor.numel() / max_elements)] if tensor.numel() > max_elements else tensor


def wide_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, in float32 if it has half precision."""
    return tensor.float() if tensor.dtype in HALF else tensor.clone()


def remove_decay(steps: list[Tensor], before: list[Tensor], decay: float, group: Mapping[str, Any]) -> None:
    """Subtract the decay from W − W' = ηU + ηλW, in place.

    Args:
        steps: W − W' of each weight.
        before: W.
        decay: ηλ.
        group: Its group. With ``cautious_weight_decay`` only entries decay whose update U is zero or has the sign of W.
            The decay has that sign too, so these are the entries whose whole step is zero or has it.
    """
    if not decay:
        return
    if group.get("cautious_weight_decay"):
        before = [old * (step * old >= 0) for step, old in zip(steps, before, strict=True)]
    torch._foreach_sub_(steps, before, alpha=decay)


def angular_equilibrium(decay: float, group: Mapping[str, Any]) -> float | None:
    r"""Return the ratio of update to weight at which updates and decay keep a weight at its size.

    A weight decays by :math:`\eta\lambda` and gets updates :math:`\eta U` of a constant size, in which the gradients of
    the steps k before have the weights :math:`w_k`, :math:`\sum w_k = 1`. Where gradients are noise, at right angles to
    the weight, the mean of :math:`\lVert W \rVert^2` rests at :math:`\eta \lVert U \rVert / \lVert W \rVert =
    \sqrt{2 \eta\lambda \sum w_k^2}`. With :math:`w_k = (1 - \beta) \beta^k` that is the formula for AdamW of Kosson et
    al., "Rotational Equilibrium", 2023, arXiv:2305.17212; the sum is one without momentum. It uses nothing of the
    update but its size and its correlation in time, so it holds for Muon too, exactly without momentum. The polar
    factor of a momentum is less correlated than the momentum, so with it the ratio is up to 1.4 times as large.
    Gradients that agree make it smaller.

    Args:
        decay: ηλ, decoupled.
        group: Its group. ``None`` where nothing decays, or not everything (cautious).
    """
    if decay <= 0 or group.get("cautious_weight_decay"):
        return None
    muon = group.get("algorithm", "adamw" if "betas" in group else "muon") == "muon"
    beta = float(group.get("momentum", 0.0) if muon else group.get("betas", (0.0,))[0])
    if muon and group.get("nesterov"):
        squares = (1 - beta) ** 2 * ((1 + beta) ** 2 + beta**4 / (1 - beta**2))
    else:
        squares = (1 - beta) / (1 + beta)
    return math.sqrt(2 * decay * squares)


class GroupSample:
    """Some weights of a group, by name, copied for a step: of each about ``max_elements`` entries at most."""

    def __init__(
        self, trainer: Trainer, group: LabelledGroup, parameters: Mapping[str, Tensor], max_elements: int
    ) -> None:
        weights = list(parameters.values())
        self.group = group
        self.names = list(parameters)
        self.shards = [replace(s, local=some_rows(s.local, max_elements)) for s in find_shards(trainer, weights)]
        self.lr = 0.0
        self.equilibrium: float | None = None  # see angular_equilibrium
        self.norms: list[Tensor] = []  # of ηU, the whole step, the gradient and the weight, each (n,)
        self._before = [wide_copy(shard.local) for shard in self.shards]
        self._gradients = entry_norms(some_rows(gradient, max_elements) for gradient in local_gradients(weights))

    def finish(self, options: StepOptions) -> None:
        """Measure the step, unless it moved nothing."""
        _, optimizer, place, group = self.group
        self.lr, decay = float(options.lr(place)), float(options.weight_decay(place))
        if self.names and self.lr != 0:
            after = [shard.local.to(old.dtype) for shard, old in zip(self.shards, self._before, strict=True)]
            steps = list(torch._foreach_sub(self._before, after))  # W − W'
            moved = entry_norms(steps)
            taken = self.lr * decay if is_decoupled(optimizer, group) else 0.0
            remove_decay(steps, self._before, taken, group)
            self.equilibrium = angular_equilibrium(taken, group)
            self.norms = [entry_norms(steps), moved, self._gradients, entry_norms(self._before)]
        self._before = []


class UpdateSample:
    """The RMS of the updates U of several groups in a step, from copies of some matrices with a gradient of each."""

    def __init__(self, trainer: Trainer, matrices: Mapping[str, Sequence[Tensor]]) -> None:
        self._trainer = trainer
        self._groups = [group for group, members in matrices.items() for _ in members]
        self._shards = find_shards(trainer, [matrix for members in matrices.values() for matrix in members])
        # The update of a weight in half precision would be rounded to the size of the decay.
        self._copies = [wide_copy(shard.local) for shard in self._shards]
        self._lrs: dict[str, float | Tensor] = {}

    @torch.no_grad()
    def finish(self, taken: Mapping[str, tuple[float | Tensor, float]]) -> None:
        """Turn the copies into updates, ηU = (1 − ηλ)W − W', by the η and λ that each group's step has taken."""
        self._lrs = {group: lr for group, (lr, _) in taken.items()}
        if self._copies:
            kept: list[Any] = [1 - taken[group][0] * taken[group][1] for group in self._groups]
            torch._foreach_mul_(self._copies, kept)
            torch._foreach_sub_(self._copies, [shard.local for shard in self._shards])

    def rms(self) -> Iterator[tuple[str, float]]:
        """Yield each group whose learning rate is not 0, with the RMS of U. A collective of all ranks."""
        if not self._lrs or not self._groups:
            return
        found = over_ranks(self._trainer, self._shards, [entry_norms(self._copies)])
        squares = found.norm[0].square()
        for group, lr in self._lrs.items():
            members = [place for place, owner in enumerate(self._groups) if owner == group]
            if members and float(lr) > 0:
                yield group, float((squares[members].sum() / found.entries[members].sum()).sqrt()) / float(lr)
