"""What the monitors share: when they measure, and how they log it."""

import itertools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole
from lightning_muon.callbacks.muon_matrices import module_names, muon_groups, muon_matrices, summarize
from lightning_muon.callbacks.name_choice import NameChoice, some

# Batches without a step after which one is told; accumulation by hand may take many.
UNSEEN_STEPS = 100


class StepMonitor(Callback):
    """Measure every n-th step of the optimizers that have Muon groups, or of those that :meth:`watches` says.

    An optimizer that is due stays so until it steps: several may take turns, a gradient scaler may skip a step, and
    accumulation by hand has steps of its own. Subclasses fill in :meth:`around_step`, which frames one step of each
    optimizer that was due, and :meth:`report`, which is called at the end of such a batch, once for all optimizers.
    Between, they cost nothing.

    Args:
        every_n_steps: How often. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Whether to log each matrix too, or patterns for the names of those to log.

    Raises:
        MisconfigurationException: If an argument is out of its range; at the start, if there are two of its kind in one
            trainer, or a pattern matches nothing.
    """

    # What is said at the start where no optimizer is watched.
    nothing_to_watch = (
        "no parameter group has algorithm='muon', so there is nothing to measure. Make the groups with"
        " route_parameters(module), or take torch.optim.Muon."
    )

    def __init__(self, every_n_steps: int | None = None, per_parameter: bool | Sequence[str] = False) -> None:
        check_whole(type(self).__name__, "every_n_steps", every_n_steps, optional=True)
        self.every_n_steps = every_n_steps
        self.per_parameter = per_parameter
        self._chosen = NameChoice(f"{type(self).__name__}: per_parameter", per_parameter)
        # Names of parameters in the module by their ids; looked up once, since a walk through a large model takes time.
        self._names: dict[int, str] = {}
        self._due: set[Optimizer] = set()
        self._watched: dict[Optimizer, tuple[Generator[None, None, None], RemovableHandle]] = {}
        self._stepped: set[Optimizer] = set()
        self._warned = False
        self._stepped_ever = False
        self._due_since: int | None = None

    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Look at gradients and old weights, yield for the step, look at new weights; closed if the step is skipped."""
        yield

    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was found in this batch."""
        raise NotImplementedError

    def watches(self, optimizer: Optimizer) -> bool:
        """Whether steps of an optimizer are measured."""
        return bool(muon_groups(optimizer))

    def choices(self, trainer: Trainer) -> Iterable[str]:
        """Return the names from which ``per_parameter`` chooses."""
        return muon_matrices(trainer.optimizers, self._names)

    def cadence(self, trainer: Trainer) -> int:
        """Return the number of steps from one measurement to the next; 0 is never."""
        every: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every

    def measures_now(self, trainer: Trainer, ahead: int = 0) -> bool:
        """Whether a measurement is due in the current step, or so many steps ahead."""
        every = self.cadence(trainer)
        return every > 0 and (logged_step(trainer) + 1 + ahead) % every == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        kind = type(self)
        if sum(isinstance(callback, kind) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{kind.__name__} is in the trainer's callbacks more than once, itself or a subclass: both would log"
                " under the same tags. Keep one of them, and give it its options where it stands in the config."
            )
        self._due.clear()
        self._warned = False
        self._stepped_ever, self._due_since = False, None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names = module_names(pl_module)
        self._chosen.check(self.choices(trainer))
        if trainer.optimizers and not any(map(self.watches, trainer.optimizers)):
            warn(trainer, f"{type(self).__name__}: {self.nothing_to_watch}")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if self.measures_now(trainer):
            self._due.update(optimizer for optimizer in trainer.optimizers if self.watches(optimizer))
            if self._due and not self._stepped_ever:
                self._tell_of_unseen_steps(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stepped_ever = True
        if optimizer in self._due and optimizer not in self._watched:
            parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
            if any(id(parameter) not in self._names for parameter in parameters):
                self._names = module_names(pl_module)  # some came later
            watch = self.around_step(pl_module, optimizer)
            next(watch, None)
            self._watched[optimizer] = watch, optimizer.register_step_post_hook(self._after_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        stepped = self._stepped
        self._stop_watching()
        if stepped:
            self._due.difference_update(stepped)
            self.report(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_watching()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watching()

    def log_summary(
        self, trainer: Trainer, quantities: Mapping[str, Mapping[str, float]], others: Mapping[str, float] | None = None
    ) -> None:
        """Log quantities over the matrices and other scalars; warn the first time that a quantity is not finite."""
        scalars = dict(others or {})
        for quantity, values in quantities.items():
            self.warn_of_not_finite(trainer, quantity, values)
            scalars |= summarize(quantity, values, self._chosen)
        log_scalars(trainer, scalars)

    def warn_of_not_finite(self, trainer: Trainer, quantity: str, values: Mapping[str, float], so: str = "") -> None:
        """Name the matrices whose value is NaN or infinite, once."""
        names = [name for name, value in values.items() if not math.isfinite(value)]
        if names and not self._warned:
            self._warned = True
            warn(
                trainer,
                f"{type(self).__name__}, step {logged_step(trainer)}: {quantity} is not finite for {some(names)}{so}."
                " This is said once.",
            )

    def _tell_of_unseen_steps(self, trainer: Trainer) -> None:
        """Warn, once, if optimizers step without Lightning, which then calls nobody."""
        if self._due_since is None:
            self._due_since = logged_step(trainer)
        elif logged_step(trainer) - self._due_since >= UNSEEN_STEPS:
            self._stepped_ever = True
            warn(
                trainer,
                f"{type(self).__name__}: in {UNSEEN_STEPS} batches no optimizer has stepped by way of Lightning, so"
                " nothing was measured. Under manual optimization, step those that self.optimizers() returns.",
            )

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stepped.add(optimizer)
        watch, _ = self._watched[optimizer]
        next(watch, None)  # of several steps in a batch the first: then it is at its end

    def _stop_watching(self) -> None:
        for watch, handle in self._watched.values():
            handle.remove()
            watch.close()
        self._watched, self._stepped = {}, set()


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning logs what the current batch gives."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_scalars(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Send scalars to every logger, and to where ``ModelCheckpoint`` and ``EarlyStopping`` find them."""
    if not scalars:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and type(logger).log_metrics is TensorBoardLogger.log_metrics:
            _write_at_once(logger, scalars, logged_step(trainer))
        else:
            logger.log_metrics(dict(scalars), step=logged_step(trainer))
    # Not through the property, which first reduces whatever else was logged.
    metrics = dict(zip(scalars, torch.tensor(list(scalars.values())).unbind(), strict=True))
    trainer._logger_connector._callback_metrics.update(metrics)


@rank_zero_only
def _write_at_once(logger: TensorBoardLogger, scalars: Mapping[str, float], step: int) -> None:
    """Write scalars as one event: TensorBoardLogger writes one each, which takes ten times as long."""
    values = [
        Summary.Value(tag=f"{logger._prefix}-{name}" if logger._prefix else name, simple_value=value)
        for name, value in scalars.items()
    ]
    logger.experiment._get_file_writer().add_summary(Summary(value=values), step)


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Write a text to TensorBoard, where that is the logger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(tag, text, logged_step(trainer))


def warn(trainer: Trainer, message: str) -> None:
    """Warn on the console, and in TensorBoard, where the text ``warnings`` lists what was said during a run."""
    rank_zero_warn(message)
    log_text(trainer, "warnings", message)
