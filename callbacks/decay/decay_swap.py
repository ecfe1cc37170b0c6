"""Another weight decay than the group's own, for the time of a step."""

from collections.abc import Callable, Sequence
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_muon.callbacks.matrices import LabelledGroup, muon_groups
from lightning_muon.optim.sharding.dtensor import local_tensor


class SwappedDecay(NamedTuple):
    """A group that has another decay than its own."""

    group: LabelledGroup
    own: float
    swapped: float  # the decay for the step
    wanted: Sequence[float]  # one for the whole group, or one for each of its matrices


class DecaySwap:
    """Set the decay of Muon's groups before each step, and restore their own afterwards.

    Between steps a schedule or a checkpoint sees the own decay, and may change it. An optimizer takes one decay for a
    group: where the matrices are to have different ones, it takes the smallest, and :meth:`catch_up` applies the rest.

    Args:
        choose: Return the decay of a group for the next step, or one for each of its matrices.
        record: Called after a step with the group, the decay that the optimizer applied, and the chosen decays.
    """

    def __init__(
        self,
        choose: Callable[[LabelledGroup], Sequence[float]],
        record: Callable[[LabelledGroup, float, Sequence[float]], None],
    ) -> None:
        self._choose = choose
        self._record = record
        self._optimizers: list[Optimizer] = []
        self._groups: list[LabelledGroup] = []
        self._all_groups: list[dict[str, Any]] = []
        self._handles: list[RemovableHandle] = []
        self._swapped: list[SwappedDecay] = []
        self._remaining: dict[Tensor, Any] = {}  # by matrix, the factor that its steps have not applied

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Register hooks before and after the steps of the optimizers that have Muon groups."""
        self._optimizers, self._groups, self._all_groups = list(optimizers), [], []
        for optimizer in optimizers:
            if muon_groups([optimizer]):
                self._handles.append(optimizer.register_step_pre_hook(self._swap))
                self._handles.append(optimizer.register_step_post_hook(self._finish))

    def groups_of(self, optimizer: Optimizer) -> list[LabelledGroup]:
        """Return the Muon groups of one optimizer, with labels that are unique among all optimizers."""
        groups = [group for other in self._optimizers for group in other.param_groups]
        # Labels are made anew only where a group was added, or all were replaced by those of a state dict.
        if len(groups) != len(self._all_groups) or any(map(is_not, groups, self._all_groups)):
            self._all_groups, self._groups = groups, muon_groups(self._optimizers)
        return [labelled for labelled in self._groups if labelled.optimizer is optimizer]

    @torch.no_grad()
    def catch_up(self) -> None:
        """Decay each matrix by what its steps have not applied."""
        for kind in (float, Tensor):  # a learning rate, and with it the factor, may be a tensor
            matrices = [matrix for matrix, factor in self._remaining.items() if isinstance(factor, kind)]
            if matrices:
                factors = [self._remaining[matrix] for matrix in matrices]
                torch._foreach_mul_([local_tensor(matrix) for matrix in matrices], factors)
        self._remaining.clear()

    def close(self) -> None:
        """Restore the groups' own decay, and remove the hooks."""
        self._restore()
        self._remaining.clear()
        while self._handles:
            self._handles.pop().remove()

    def _swap(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for labelled in self.groups_of(optimizer):
            group = labelled.group
            if any(swapped.group.group is group for swapped in self._swapped):
                continue  # the step of a subclass calls that of its parent, which runs the hooks again
            wanted = self._choose(labelled)
            own, group["weight_decay"] = group["weight_decay"], min(wanted)
            self._swapped.append(SwappedDecay(labelled, own, group["weight_decay"], wanted))

    def _finish(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for labelled, _, swapped, wanted in self._swapped:
            lr, taken = labelled.group["lr"], labelled.group["weight_decay"]
            # If someone has set another decay during the step, it holds for all matrices.
            decays = wanted if taken == swapped else [taken] * len(wanted)
            self._record(labelled, taken, decays)
            # With one decay for the group there is one in the list, which was applied.
            for matrix, decay in zip(labelled.group["params"], decays, strict=False):
                if decay != taken and matrix.grad is not None:  # without a gradient the matrix took no step
                    factor = (1 - lr * decay) / (1 - lr * taken)
                    self._remaining[matrix] = self._remaining.get(matrix, 1.0) * factor
        self._restore()

    def _restore(self) -> None:
        while self._swapped:
            labelled, own, swapped, _ = self._swapped.pop()
            if labelled.group["weight_decay"] == swapped:  # else someone has set it during the step
                labelled.group["weight_decay"] = own
