"""When the monitors measure: a callback that measures every n-th optimizer step."""

import itertools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muon.callbacks.arguments import NameChoice, check_whole, some
from lightning_muon.callbacks.limits import Limit
from lightning_muon.callbacks.logging import log_scalars, logged_step, summarize, warn
from lightning_muon.callbacks.matrices import frozen_names, module_names, muon_groups, muon_matrices

# Warn after so many batches without a step; under manual optimization, accumulation may take many batches.
MOST_BATCHES_WITHOUT_STEP = 100


class StepMonitor(Callback):
    """Measure every n-th step of the optimizers that have Muon groups, or of those that :meth:`watches` accepts.

    An optimizer that is due stays due until it steps: several optimizers may take turns, a gradient scaler may skip a
    step, and manual optimization may accumulate. A subclass overrides :meth:`around_step`, which runs around one step
    of each optimizer that is due and appends to ``_measured``, and :meth:`report`, which gets the list at the end of
    the batch.

    Args:
        every_n_steps: How often to measure, in optimizer steps. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log the value of each matrix too: of all (true), or of those whose names match a pattern.

    Raises:
        MisconfigurationException: If an argument is wrong, a pattern matches nothing, or the trainer has two of these.
    """

    # The warning at the start of training if there is no optimizer to watch.
    nothing_to_watch = (
        "no parameter group has algorithm='muon', so there is nothing to measure. Make the groups with"
        " route_parameters(module), or take torch.optim.Muon."
    )

    def __init__(self, every_n_steps: int | None = None, per_parameter: bool | Sequence[str] = False) -> None:
        check_whole(type(self).__name__, optional=True, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.per_parameter = per_parameter
        self._chosen = NameChoice(f"{type(self).__name__}: per_parameter", per_parameter)
        # Names of parameters by id, looked up once: a walk through a large model takes time.
        self._names: dict[int, str] = {}
        self._due: set[Optimizer] = set()
        self._watched: dict[Optimizer, tuple[Generator[None, None, None], RemovableHandle]] = {}
        self._stepped: set[Optimizer] = set()
        self._measured: list[Any] = []
        self._limits: dict[str, Limit] = {}
        self._warned_of_not_finite = False
        self._saw_a_step = False
        self._due_since: int | None = None

    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Read gradients and old weights, yield for the step, read new weights; closed early if the step is skipped."""
        yield

    def report(self, trainer: Trainer, pl_module: LightningModule, measured: list[Any]) -> None:
        """Log what :meth:`around_step` has measured in this batch."""
        raise NotImplementedError

    def make_limits(self) -> dict[str, Limit]:
        """Return the limits of quantities, by name, none of which has been warned of."""
        return {}

    def watches(self, optimizer: Optimizer) -> bool:
        """Return whether to measure the steps of an optimizer."""
        return bool(muon_groups([optimizer]))

    def choices(self, trainer: Trainer) -> Iterable[str]:
        """Return the names that ``per_parameter`` chooses from."""
        return muon_matrices(trainer.optimizers, self._names)

    def cadence(self, trainer: Trainer) -> int:
        """Return the number of steps between two measurements; 0 for no measurements."""
        every: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every

    def measures_now(self, trainer: Trainer, ahead: int = 0) -> bool:
        """Return whether a measurement is due in the current step, or in a step that many steps ahead."""
        every = self.cadence(trainer)
        return every > 0 and (logged_step(trainer) + 1 + ahead) % every == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        reason = "both would log under the same tags. Keep one of them, and give it its options"
        check_only_one(trainer, type(self), f", itself or a subclass: {reason} where it stands in the config.")
        self._due.clear()
        self._limits = self.make_limits()
        self._warned_of_not_finite = False
        self._saw_a_step, self._due_since = False, None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names = module_names(pl_module)
        frozen = frozen_names(pl_module)  # they may be unfrozen and added
        self._chosen.check([*self.choices(trainer), *frozen])
        if trainer.optimizers and not frozen and not any(map(self.watches, trainer.optimizers)):
            warn(trainer, f"{type(self).__name__}: {self.nothing_to_watch}")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if self.measures_now(trainer):
            self._due.update(optimizer for optimizer in trainer.optimizers if self.watches(optimizer))
            if self._due and not self._saw_a_step:
                self._warn_of_unseen_steps(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._saw_a_step = True
        if optimizer in self._due and optimizer not in self._watched:
            parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
            if any(id(parameter) not in self._names for parameter in parameters):
                self._names = module_names(pl_module)  # some parameters were added later
            measurement = self.around_step(pl_module, optimizer)
            next(measurement, None)
            self._watched[optimizer] = measurement, optimizer.register_step_post_hook(self._after_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        stepped, measured = self._stepped, self._measured
        self._stop_watching()
        if stepped:
            self._due.difference_update(stepped)
            self.report(trainer, pl_module, measured)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def log_summary(self, trainer: Trainer, quantities: Mapping[str, Mapping[str, float]], **others: float) -> None:
        """Log summaries of quantities, given by name, and other scalars; warn once if a value is not finite."""
        scalars = dict(others)
        for quantity, values in quantities.items():
            self.warn_of_not_finite(trainer, quantity, values)
            scalars |= summarize(quantity, values, self._chosen)
        log_scalars(trainer, scalars)

    def warn_of_not_finite(self, trainer: Trainer, quantity: str, values: Mapping[str, float], so: str = "") -> None:
        """Warn once a run with the names whose value is NaN or infinite, and with what follows from it (``so``)."""
        names = [name for name, value in values.items() if not math.isfinite(value)]
        if names and not self._warned_of_not_finite:
            self._warned_of_not_finite = True
            warn(
                trainer,
                f"{type(self).__name__}, step {logged_step(trainer)}: {quantity} is not finite for {some(names)}{so}."
                " This is said once.",
            )

    def _warn_of_unseen_steps(self, trainer: Trainer) -> None:
        """Warn once if optimizers step without Lightning, which then calls no hooks."""
        if self._due_since is None:
            self._due_since = logged_step(trainer)
        elif logged_step(trainer) - self._due_since >= MOST_BATCHES_WITHOUT_STEP:
            self._saw_a_step = True
            warn(
                trainer,
                f"{type(self).__name__}: in {MOST_BATCHES_WITHOUT_STEP} batches no optimizer has stepped by way of"
                " Lightning, so nothing was measured. Under manual optimization, step those that self.optimizers()"
                " returns.",
            )

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stepped.add(optimizer)
        measurement, _ = self._watched[optimizer]
        next(measurement, None)  # of several steps in a batch, only the first is measured

    def _close(self) -> None:
        """Remove what a run leaves on the optimizers and the module."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        for measurement, handle in self._watched.values():
            handle.remove()
            measurement.close()
        self._watched, self._stepped, self._measured = {}, set(), []


def check_only_one(trainer: Trainer, kind: type[Callback], reason: str) -> None:
    """Raise a MisconfigurationException, which ends with the reason, if a trainer has two callbacks of a class."""
    if sum(isinstance(callback, kind) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise MisconfigurationException(f"{kind.__name__} is in the trainer's callbacks more than once{reason}")
