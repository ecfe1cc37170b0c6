"""The learning rate and the weight decay that a step really takes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Optimizers of torch that add the decay to the gradient, and whose groups do not say so.
COUPLED = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.RMSprop,
)


class StepOptions:
    """The options of an optimizer's groups as its next step finds them.

    Made in ``on_before_optimizer_step``, before the weights change. Without a gradient scaler the step's pre-hooks have
    run by then: what they set, such as a raised weight decay, is in the groups. With a scaler they run later: the
    options are read again, after all pre-hooks that were registered before. Post-hooks may set the groups back, and
    schedulers go on, so afterwards it is too late to read them.

    Args:
        optimizer: Whose groups are read.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._read(optimizer)
        self._handle = optimizer.register_step_pre_hook(self._read)

    def lr(self, index: int) -> float | Tensor:
        """Return the learning rate of a group by its place in ``param_groups``; 1 where it has none."""
        return self._options[index][0]

    def weight_decay(self, index: int) -> float | Tensor:
        """Return the weight decay of a group by its place in ``param_groups``; 0 where it has none."""
        return self._options[index][1]

    def close(self) -> None:
        """Listen no longer. What was read stays."""
        self._handle.remove()

    def _read(self, optimizer: Optimizer, *_: Any) -> None:
        self._options = [
            (_kept(group.get("lr", 1.0)), _kept(group.get("weight_decay", 0.0))) for group in optimizer.param_groups
        ]


def _kept(option: float | Tensor) -> float | Tensor:
    """Return an option as it is now: schedulers change tensors in place."""
    return option.detach().clone() if isinstance(option, Tensor) else option


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weights decay beside the update, by ηλW, and not by an addition to the gradient."""
    return bool(group.get("decoupled_weight_decay", not isinstance(optimizer, COUPLED)))
