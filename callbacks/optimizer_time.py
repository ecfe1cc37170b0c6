"""What the optimizer costs: its share of the time of a step, and the memory of its state."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muon.callbacks.logging import log_scalars
from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.shards import EACH_RANK, over_ranks
from lightning_muon.optim.sharding.dtensor import local_tensor


class OptimizerTimeMonitor(StepMonitor):
    """Log which share of the time of a step the optimizer takes, and once how much memory its state takes.

    - ``optimizer_share``: time of the updates over time of the step, between 0 and 1; over several ranks, the sum of
      the first over the sum of the second.
    - ``optimizer_state/bytes``: bytes of the tensors in the state of all optimizers, on rank 0, at the first logged
      step. It is told from their shapes, so no device waits. Of a sharded state only this rank's part counts.

    The update lasts from the last ``on_before_optimizer_step`` to the end of ``step()``, gradient clipping included;
    those of several optimizers are added. The step lasts from the start to the end of its batches (several if gradients
    are accumulated), without waiting for data, validation and checkpoints. The step before the logged one is measured,
    so that the work of other monitors does not count, unless ``every_n_steps=1``. A GPU is timed by CUDA events, with
    one synchronization when the value is logged.

    Args:
        every_n_steps: How often to log. Default: the trainer's ``log_every_n_steps``.

    Raises:
        MisconfigurationException: If ``every_n_steps`` is less than one, or the trainer has two of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import OptimizerTimeMonitor
        >>> trainer = Trainer(callbacks=[OptimizerTimeMonitor()])
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)
        self._batch_start: Moment | None = None
        self._update_starts: dict[Optimizer, Moment] = {}
        self._update_ends: dict[Optimizer, Moment] = {}
        self._batches: list[tuple[Moment, Moment]] = []
        self._updates: list[tuple[Moment, Moment]] = []
        self._hooks: dict[Optimizer, RemovableHandle] = {}
        self._device = torch.device("cpu")
        self._is_due = False
        self._steps = -1  # at the start of the last batch
        self._has_logged_state = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._steps, self._has_logged_state = -1, False
        self._forget()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = trainer.strategy.root_device

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        steps = trainer.global_step
        is_first, self._steps = steps != self._steps, steps  # of the batches of this step
        if self.measures_now(trainer, ahead=1):
            self._is_due = True
        if self._is_due and not self._updates:  # else a measurement has not been logged yet
            if is_first:
                self._batches.clear()
            if is_first or self._batches:
                self._batch_start = Moment(self._device)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._batch_start is not None:
            if optimizer not in self._hooks:
                self._hooks[optimizer] = optimizer.register_step_post_hook(self._after_step)
            self._end_update(optimizer)
            self._update_starts[optimizer] = Moment(self._device)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self._batch_start is not None:
            self._batches.append((self._batch_start, Moment(self._device)))
            for optimizer in list(self._update_starts):
                self._end_update(optimizer)
            self._stop_watching()
        if self._updates and self.measures_now(trainer):
            spans = self._updates, self._batches
            seconds = [torch.tensor([sum(start.until(end) for start, end in of_kind)]) for of_kind in spans]
            updates, batches = over_ranks(trainer, [EACH_RANK], seconds).sum.flatten().tolist()
            scalars = {"optimizer_share": updates / batches}
            if not self._has_logged_state:
                scalars["optimizer_state/bytes"] = float(state_bytes(trainer.optimizers))
                self._has_logged_state = True
            log_scalars(trainer, scalars)
            self._forget()

    @override
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The step of a subclass calls that of its parent, which runs the hooks too: the last call is the end.
        self._update_ends[optimizer] = Moment(self._device)

    @override
    def _stop_watching(self) -> None:
        super()._stop_watching()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._update_starts, self._update_ends, self._batch_start = {}, {}, {}, None

    def _end_update(self, optimizer: Optimizer) -> None:
        """Record the times of an update, unless it was interrupted."""
        start, end = self._update_starts.pop(optimizer, None), self._update_ends.pop(optimizer, None)
        if start is not None and end is not None:
            self._updates.append((start, end))

    def _forget(self) -> None:
        self._is_due = False
        self._batches.clear()
        self._updates.clear()


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the bytes of all tensors in the state of optimizers, of which DTensors count with this rank's part.

    Tensors may stand in lists and dictionaries; one that stands in several places counts once.
    """
    states = tree_leaves([dict(optimizer.state) for optimizer in optimizers])
    tensors = {id(leaf): local_tensor(leaf) for leaf in states if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Moment:
    """The current time; on a GPU, a CUDA event on its stream."""

    def __init__(self, device: torch.device) -> None:
        self._at = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def until(self, later: "Moment") -> float:
        """Return the seconds until a later moment. On a GPU, wait for its event."""
        if self._event is None or later._event is None:
            return later._at - self._at
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000  # from milliseconds
