"""A guard that ends a run when it goes bad, or skips the steps that would spoil it, and tells of spikes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole, is_number, some
from lightning_muon.callbacks.logging import log_message, log_scalars, log_text, warn
from lightning_muon.callbacks.matrices import module_names
from lightning_muon.callbacks.measures.gradient_norms import GradientNorms, real_entries
from lightning_muon.callbacks.measures.spikes import COUNTED, LEAST_SPREAD_OF_LOSS, LEAST_SPREAD_OF_NORM, SpikeFinder
from lightning_muon.callbacks.monitor import check_only_one
from lightning_muon.callbacks.shards import largest_entries
from lightning_muon.optim.sharding.dtensor import local_tensor
from lightning_muon.report.plain_text import printable
from lightning_muon.report.quantities import quantity

# Lightning's default, for a trainer with log_every_n_steps=0.
STEPS_WITHOUT_LOG = 50

# A gradient scaler halves its scale with each step that it skips. It finds the right scale in far fewer steps.
MOST_SKIPPED_BY_SCALER = 50

# Of the last 1000 steps.
MOST_IN_A_SPIKE = quantity("gradient_spikes").healthy.bound or 0


class NonFiniteError(RuntimeError):
    """A run went bad: a gradient or a weight is not finite. All ranks raise it together.

    Args:
        reason: What is not finite, and since when.
        checkpoint: The newest checkpoint that :class:`RunGuard` knows to be healthy; ``None`` if there is none.
        after: The number of steps after which it was saved, if that is known.
    """

    def __init__(self, reason: str, checkpoint: str | None = None, after: int | None = None) -> None:
        at = "" if after is None else f" (after {after} steps)"
        healthy = (
            f"the newest healthy checkpoint is '{checkpoint}'{at}" if checkpoint else "there is no healthy checkpoint"
        )
        super().__init__(f"{reason}; {healthy}")
        self.reason = reason
        self.checkpoint = checkpoint


class RunGuard(Callback):
    """End a run when its gradients or weights are not finite, keep such weights out of checkpoints, tell of spikes.

    One NaN in a gradient makes all weights NaN within two steps. Without a guard, training goes on to its end, and the
    last checkpoint is overwritten by one that nobody can use.

    - ``mode="stop"``: the norm of each gradient is computed in every step, on the device. They are read every
      ``every_n_steps``, and before a checkpoint is written. If one is not finite, all ranks raise
      :class:`NonFiniteError`, which names the first such step, the parameters, and the newest healthy checkpoint.
      ``MuonCLI`` shows it in one line with the command to resume, and ends with exit code 1.
    - ``mode="skip"``: a step whose gradient is not finite is not taken, on any rank: neither weights nor optimizer
      state change, only the batch and the step are used up. A warning tells each time. The run ends after more than
      ``most_skips`` in a row. The decision needs the norms before each step, so the host waits for the device.

    In both modes each checkpoint, also one with weights only, is refused before it is written if a weight that is
    trained is not finite: the earlier ones stay as they are. A run that would begin with such weights does not.

    A gradient scaler (``16-mixed``) makes gradients infinite while it searches for its scale, and skips such steps
    itself: only 50 of them in a row end the run.

    A spike, a loss or a norm of the whole gradient far above its median in the last 100 steps, is told once. A spike of
    the loss is a warning. One of the gradient is not: clipping is there for it, and the loss need not follow. More than
    5 steps with one within 1000 steps are a warning.

    Under several ranks the decisions are the same on all. A NaN on one, or in one shard, counts on all. It works under
    manual optimization and with several optimizers as long as they step by way of Lightning. All ranks must take the
    same steps. Gradients that change after ``on_before_optimizer_step`` of this callback are seen in the next step.

    - ``went_bad``: the step from which on the run was not finite, logged as it ends.
    - ``skipped_steps``: the number of skipped steps, logged after each.
    - ``gradient_spikes``: how many of the last 1000 steps had a gradient in a spike, logged while there are any; of
      several optimizers, the most.

    Args:
        mode: Whether to ``"stop"`` or to ``"skip"``.
        most_skips: The most steps that are skipped in a row.
        every_n_steps: How often to read the norms, in optimizer steps. Default: the trainer's ``log_every_n_steps``.
        spike_factor: How far above the median a spike is, in standard deviations of the values without outliers, of at
            least a tenth of the median loss or 0.3 of the median norm. Null: spikes are not told.

    Raises:
        MisconfigurationException: If an argument is wrong, or the trainer has two of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import RunGuard
        >>> trainer = Trainer(callbacks=[RunGuard(mode="skip", most_skips=5)])
    """

    def __init__(
        self,
        mode: Literal["stop", "skip"] = "stop",
        most_skips: int = 3,
        every_n_steps: int | None = None,
        spike_factor: float | None = 10.0,
    ) -> None:
        check_whole("RunGuard", most_skips=most_skips)
        check_whole("RunGuard", optional=True, every_n_steps=every_n_steps)
        if mode not in ("stop", "skip"):
            raise MisconfigurationException(f"RunGuard: mode must be 'stop' or 'skip', got {mode!r}")
        if spike_factor is not None and not (is_number(spike_factor) and 0 < spike_factor < math.inf):
            raise MisconfigurationException(f"RunGuard: spike_factor must be positive or null, got {spike_factor!r}")
        self.mode = mode
        self.most_skips = most_skips
        self.every_n_steps = every_n_steps
        self.spike_factor = spike_factor
        self.skipped = 0  # steps
        self._in_a_row: dict[int, int] = {}  # by the place of an optimizer
        self._names: dict[int, str] = {}
        self._watched: dict[Optimizer, GradientNorms] = {}
        self._losses: list[tuple[int, Tensor | None]] = []
        self._spikes: dict[str, SpikeFinder] = {}
        self._looked_at = 0
        self._saved: dict[str, int] = {}  # by the path of a checkpoint, the steps after which it was saved
        self._began_with: str | None = None  # the checkpoint from which this run went on
        self._error: NonFiniteError | None = None
        self._guarded: Any = None  # the strategy whose saving is guarded

    @property
    @override
    def state_key(self) -> str:
        # Of two in one trainer, which setup() refuses.
        return self._generate_state_key(
            mode=self.mode,
            most_skips=self.most_skips,
            every_n_steps=self.every_n_steps,
            spike_factor=self.spike_factor,
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_only_one(trainer, RunGuard, ": keep one, with its options where it stands in the config.")
        self._release()
        if stage == "fit":
            self.skipped, self._in_a_row = 0, {}  # before the state in a checkpoint is restored
            self._saved, self._error, self._began_with = {}, None, None
            self._guard_saving(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names = module_names(pl_module)
        self._watched, self._losses, self._spikes = {}, [], {}
        self._looked_at = trainer.global_step
        self._check_weights(trainer, "at the start of training")
        self._began_with = None if trainer.ckpt_path is None else str(trainer.ckpt_path)

    @override
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        watched = self._watched.get(optimizer)
        if watched is None or not watched.is_complete(optimizer):
            self._look(trainer)  # some parameters were added
            self._names = module_names(pl_module)
            place = trainer.optimizers.index(optimizer)
            watched = self._watched[optimizer] = GradientNorms(trainer, place, optimizer, self._names)
        norms = watched.norms()
        if self.mode == "skip" and not _has_scaler(trainer):
            self._skip_if_bad(trainer, watched, watched.whole(trainer, norms.unsqueeze(0))[0])
        watched.seen.append((trainer.global_step, norms))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        if self.spike_factor is not None:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._losses.append((trainer.global_step - 1, loss if isinstance(loss, Tensor) else None))
        every: int = self.every_n_steps or trainer.log_every_n_steps or STEPS_WITHOUT_LOG  # type: ignore[attr-defined]
        if trainer.global_step // every > self._looked_at // every:
            self._look(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": dict(self._in_a_row)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], dict(state_dict["in_a_row"])

    @torch.no_grad()
    def _look(self, trainer: Trainer) -> None:
        """Read what was measured since the last look, and end the run if it went bad. A collective."""
        self._looked_at = trainer.global_step
        losses, self._losses = self._losses, []
        read = [entry for watched in self._watched.values() for entry in watched.read(trainer)]
        read.sort(key=lambda entry: entry.step)
        for step, place, names, _ in read:
            if _has_scaler(trainer):
                self._count_skip_of_the_scaler(trainer, step, place, names)
            elif names and self.mode == "stop":
                self._stop(trainer, step, f"in step {step} the norm of the gradient of {some(names)} is not finite")
        if self.spike_factor is not None:
            often = 0
            for place in {entry.place: None for entry in read}:
                norms = [(entry.step, entry.norm) for entry in read if entry.place == place]
                of = f" of optimizer {place}" if len(trainer.optimizers) > 1 else ""
                what = f"the norm of the gradient{of}"
                often = max(often, self._tell_spikes(trainer, what, norms, LEAST_SPREAD_OF_NORM, MOST_IN_A_SPIKE))
            if often:
                log_scalars(trainer, {"gradient_spikes": often})
            self._tell_spikes(trainer, "the loss", _mean_losses(trainer, losses), LEAST_SPREAD_OF_LOSS)

    def _skip_if_bad(self, trainer: Trainer, watched: GradientNorms, norms: Tensor) -> None:
        """Drop the gradients of an optimizer if one is not finite: its step then changes nothing."""
        names, step = watched.bad(norms), trainer.global_step
        in_a_row = self._in_a_row[watched.place] = self._in_a_row.get(watched.place, 0) + 1 if names else 0
        if not names:
            return
        what = f"in step {step} the norm of the gradient of {some(names)} is not finite"
        if in_a_row > self.most_skips:
            self._stop(trainer, step, f"{what}, after {self.most_skips} skipped steps in a row")
        for parameter in watched.parameters:
            parameter.grad = None
        self.skipped += 1
        log_scalars(trainer, {"skipped_steps": self.skipped})
        warn(trainer, f"RunGuard: {what}: the step is skipped. Skipped in this run: {self.skipped}.")

    def _count_skip_of_the_scaler(self, trainer: Trainer, step: int, place: int, names: Sequence[str]) -> None:
        in_a_row = self._in_a_row[place] = self._in_a_row.get(place, 0) + 1 if names else 0
        if in_a_row > MOST_SKIPPED_BY_SCALER:
            self._stop(
                trainer,
                step,
                f"up to step {step} the gradient scaler has skipped {in_a_row} steps in a row: the gradient of"
                f" {some(names)} is not finite, whatever its scale",
            )

    def _tell_spikes(
        self, trainer: Trainer, what: str, series: Sequence[tuple[int, float]], least_spread: float, most: float = 0
    ) -> int:
        """Tell of each spike that begins, and return how many of the last 1000 steps are in one.

        It is a warning if these are more than ``most``.
        """
        finder = self._spikes.setdefault(what, SpikeFinder(self.spike_factor or math.inf, least_spread))
        for spike in finder.find(series):
            rose = f"{what} rose to {spike.value:.3g}, from a median of {spike.usual:.3g}"
            message = f"RunGuard, step {spike.step}: {rose}"
            if finder.often > most:
                often = f"; so high in {finder.often} of the last {COUNTED} steps" if most else ""
                advice = "Look at the batch; if this comes often, lower the learning rate or clip."
                warn(trainer, f"{message}{often}. {advice} This is said once for each spike.")
            else:
                message += f". Usual in up to {most:g} of {COUNTED} steps."
                rank_zero_info(printable(message))
                log_message(trainer, "spikes", message)
        return finder.often

    def _stop(self, trainer: Trainer, step: int, reason: str) -> None:
        checkpoint = next((path for path in reversed(self._saved) if _is_there(path)), None)
        after = self._saved.get(checkpoint or "")
        self._error = NonFiniteError(f"RunGuard: {reason}", checkpoint or self._began_with, after)
        log_scalars(trainer, {"went_bad": step})
        log_text(trainer, "warnings", str(self._error))
        raise self._error

    def _guard_saving(self, trainer: Trainer) -> None:
        """Check the weights before a checkpoint is written, and remember where it is.

        Every way of saving goes through the strategy. Lightning's hook ``on_save_checkpoint`` is not called for
        checkpoints with weights only, and does not know the path.
        """
        self._guarded = strategy = trainer.strategy
        save = strategy.save_checkpoint

        def save_if_healthy(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
            if self._error is not None:
                return  # the run is ending, and something wants to save it as it is
            self._look(trainer)
            self._check_weights(trainer, f"after step {trainer.global_step - 1}")
            save(checkpoint, filepath, storage_options=storage_options)
            self._saved.pop(str(filepath), None)
            self._saved[str(filepath)] = trainer.global_step

        strategy.save_checkpoint = save_if_healthy  # type: ignore[method-assign]

    @torch.no_grad()
    def _check_weights(self, trainer: Trainer, when: str) -> None:
        """Raise a NonFiniteError if a trained weight is not finite. A collective."""
        for place, optimizer in enumerate(trainer.optimizers):
            weights = GradientNorms(trainer, place, optimizer, self._names)
            # The largest, because the norm of large weights may be too large for float32.
            largest = largest_entries(real_entries(local_tensor(parameter)) for parameter in weights.parameters)
            if names := weights.bad(weights.whole(trainer, largest.unsqueeze(0))[0]):
                self._stop(trainer, max(trainer.global_step - 1, 0), f"{when} weights in {some(names)} are not finite")

    def _release(self) -> None:
        if self._guarded is not None:
            vars(self._guarded).pop("save_checkpoint", None)
        self._guarded = None


def _has_scaler(trainer: Trainer) -> bool:
    """Return whether a gradient scaler skips the steps whose gradient is not finite."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.is_enabled()


def _mean_losses(trainer: Trainer, losses: Sequence[tuple[int, Tensor | None]]) -> list[tuple[int, float]]:
    """Return steps and losses, the mean over the ranks; those that are not known are NaN. A collective."""
    if not losses:
        return []
    device = trainer.strategy.root_device
    unknown = torch.tensor(math.nan, device=device)
    # A loss has one entry, but is not always a scalar.
    values = torch.stack([unknown if loss is None else loss.detach().to(device).flatten()[0] for _, loss in losses])
    values = values.float()
    if trainer.world_size > 1:
        dist.all_reduce(values)
    means = (values / trainer.world_size).tolist()
    return [(step, mean) for (step, _), mean in zip(losses, means, strict=True)]


def _is_there(path: str) -> bool:
    return "://" in path or Path(path).exists()
