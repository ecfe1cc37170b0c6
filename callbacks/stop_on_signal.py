"""``StopOnSignal``: SIGTERM and Ctrl-C end a run after its step, with a checkpoint, on all ranks alike."""

import atexit
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_muon.callbacks.arguments import is_number
from lightning_muon.callbacks.stopping.agreement import Agreement, Gate
from lightning_muon.callbacks.stopping.last_checkpoint import (
    end_of_restart,
    restart_validation_count,
    save_last,
    trained_weights,
    validate_after_resuming,
    validation_is_due,
)
from lightning_muon.callbacks.stopping.receiver import STOP_SIGNALS, SignalReceiver, StoppedBySignal, watch_forks

_END_OF_VALIDATION = sys.maxsize
_SAME_REQUEUE = 10.0  # seconds within which the signals to requeue count once, which all ranks receive

# Each run of a program has its own keys in the store.
_runs = count()


class StopOnSignal(Callback):
    """End a run cleanly on SIGTERM and on SIGINT, which is Ctrl-C.

    The running step is finished, a checkpoint is saved, and the process ends without a traceback, with exit code 143
    after SIGTERM and 130 after SIGINT. The checkpoint is ``last.ckpt`` of the run's ``ModelCheckpoint``, and resumes
    exactly; a validation that was due or under way is made again from its beginning. A second signal, 0.2 s later or
    more (1 s on several ranks), ends the run at once, without a checkpoint.

    On several ranks it does not matter which of them receive the signal: all stop after the same step. They agree
    through the store of the process group. A step costs neither a collective nor a synchronization with the GPU;
    Lightning's own broadcast before each batch, which does, is switched off.

    Under SLURM, the signal to requeue is left to Lightning, which saves and requeues; but all ranks do so after the
    same step, instead of wherever they are. In a notebook or an interactive Python, and outside the main thread, the
    callback does nothing.

    Example::

        Trainer(callbacks=[StopOnSignal()])

    Args:
        grace: Seconds from the signal to the end of the process. If step and checkpoint take longer, the process ends
            without them and says so. The default is less than the 30 seconds after which SLURM, Kubernetes and
            ``torchrun`` kill.
        resume: Returns the command that goes on from a checkpoint, to be printed; without it, only the path is.

    Raises:
        MisconfigurationException: If ``grace`` is not a number above zero.
    """

    def __init__(self, grace: float = 25.0, resume: Callable[[str], str] | None = None) -> None:
        if not is_number(grace) or not 0 < grace < float("inf"):
            raise MisconfigurationException(f"StopOnSignal: grace must be a number of seconds above 0, got {grace!r}")
        self.grace = grace
        self.resume = resume
        self._receiver: SignalReceiver | None = None
        self._agreement: Agreement | None = None
        self._children: list[Any] = []  # processes that Lightning has started for other ranks
        self._gate = Gate(0, 0)
        self._global_step = 0
        self._announced = False
        self._finishing = False  # all steps are made: the run ends by itself
        self._repeat_validation = False  # in the checkpoint that is being saved
        self._requeued_at = float("-inf")
        self._user_handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._requeue: Callable[[int, FrameType | None], Any] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Last, so that the checkpoint has what all others do after the step.
        untyped: Any = trainer
        untyped.callbacks = [*(callback for callback in untyped.callbacks if callback is not self), self]
        watch_forks(of_a_run=True)
        handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
        self._user_handlers = {
            signum: handler
            for signum, handler in handlers.items()
            if callable(handler) and handler is not signal.default_int_handler and not _is_ours(handler)
        }

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        agreement = Agreement.in_group(next(_runs))
        if agreement is None or hasattr(sys, "ps1"):
            return
        self._agreement = agreement
        self._gate, self._global_step = Gate(0, 0), trainer.global_step
        self._announced = self._finishing = False
        seconds = f"{self.grace:g} s"
        receiver = SignalReceiver(
            self.grace,
            heard=agreement.ask,
            late=f"stopped without a checkpoint: the step and its checkpoint took longer than the grace of {seconds}"
            if trainer.is_global_zero
            else "",
            poll=lambda: self._poll(agreement, trainer.is_global_zero),
            before_exit=lambda: self._end_others(agreement),
            others=self._requeue_signals(trainer, agreement),
            previous=self._user_handlers,
        )
        if receiver.start():
            self._receiver = receiver
            self._children = list(getattr(trainer.strategy.launcher, "procs", ()))
            # Before each batch, Lightning broadcasts from rank 0 whether that has received SIGTERM, and waits for it.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _requeue_signals(self, trainer: Trainer, agreement: Agreement) -> dict[int, Callable[[int], None]]:
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return {}
        signum = environment.requeue_signal
        handler = None if signum is None else signal.getsignal(signum)
        if signum is None or not callable(handler):
            return {}

        def ask(signum: int) -> None:
            if time.monotonic() - self._requeued_at > _SAME_REQUEUE:
                agreement.ask(signum)

        self._requeue = handler
        return {signum: ask}

    # ---- in the thread of the receiver

    def _poll(self, agreement: Agreement, speaks: bool) -> float:
        seconds = agreement.poll()
        receiver, signum = self._receiver, agreement.signum
        if receiver is None or signum not in STOP_SIGNALS:
            return seconds
        receiver.tell(signum)
        if speaks and not self._announced:
            sys.stderr.write(f"\n{signal.Signals(signum).name}: finishing the step and saving; again: end at once\n")
        self._announced = True
        if agreement.must_end_now():
            receiver.end_now()
        return seconds

    def _end_others(self, agreement: Agreement) -> None:
        if agreement.world_size > 1:
            agreement.end_all_now()
            time.sleep(0.5)  # so that the others read it
        for process in self._children:
            process.kill()

    # ---- gates

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        end_of_restart(trainer)
        # Between two steps of the optimizer there are accumulated gradients, which no checkpoint has.
        if self._receiver is not None and trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self._at(Gate(self._gate.step + 1, 0), trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            restart_validation_count(trainer)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._receiver is not None:
            self._at(Gate(self._gate.step, self._gate.validation_batch + 1), trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # For ranks that have fewer batches than others, and would otherwise train on alone. The best checkpoints and
        # the like are not yet updated, so this validation can still be repeated.
        if self._receiver is not None:
            self._at(Gate(self._gate.step, _END_OF_VALIDATION), trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            end_of_restart(trainer)

    def _at(self, gate: Gate, trainer: Trainer) -> None:
        self._gate = gate
        signum = None if self._agreement is None or self._finishing else self._agreement.at(gate)
        if signum in STOP_SIGNALS:
            self._stop(trainer, signum)
        elif signum is not None and self._agreement and self._requeue:
            self._requeue(signum, None)
            self._requeued_at = time.monotonic()
            self._agreement.done(gate)

    def _stop(self, trainer: Trainer, signum: int) -> None:
        # A thread of Lightning's looks at this list every 5 s, and kills all ranks once one has ended with such a code.
        getattr(trainer.strategy.launcher, "procs", []).clear()
        atexit.register(_await, self._children)
        self._finishing = _all_steps_are_made(trainer)
        self._repeat_validation = trainer.validating or validation_is_due(trainer)
        path, problem = None, "no checkpoint is saved in this run"
        try:
            with trained_weights(trainer, averaged=self._gate.validation_batch not in {0, _END_OF_VALIDATION}):
                path = save_last(trainer, goes_on=self._finishing)
        except Exception as error:  # the disk may be full; the line says what is lost
            problem = f"the checkpoint could not be saved ({type(error).__name__}: {error})"
        self._repeat_validation = False
        if trainer.is_global_zero:
            self._write_last_lines(trainer, signum, path, problem)
        if self._finishing:
            # A validation may be left, and there would be nothing to resume.
            return
        if trainer.training:
            # What is left of the step, so that its metrics are logged.
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()
        raise StoppedBySignal(signum)

    def _write_last_lines(self, trainer: Trainer, signum: int, path: str | None, problem: str) -> None:
        what = "ending after the last step," if self._finishing else "stopped after step"
        lines = [f"{signal.Signals(signum).name}: {what} {trainer.global_step}"]
        if path is None:
            lines[0] += f"; {' '.join(problem.split())}"
        else:
            folder = Path.cwd()
            shown = str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path
            lines.append(f"checkpoint: {shown}")
            if self.resume and not self._finishing:
                lines.append(f"resume:     {self.resume(shown)}")
        sys.stderr.write("".join(f"{line}\n" for line in lines))

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._repeat_validation:
            validate_after_resuming(trainer, checkpoint["loops"]["fit_loop"])

    # ---- the end

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._receiver is None or self._receiver.signum is None:
            self._close()
            return
        self._receiver.stop_polling()  # it still sees to it that the process ends in time
        if isinstance(exception, Exception):
            # On the way to the end: another rank may have ended at once, or before it has begun to train.
            name = signal.Signals(self._receiver.signum).name
            reason = " ".join(str(exception).split())
            sys.stderr.write(f"{name}: stopped without a checkpoint: {type(exception).__name__}: {reason}\n")
            raise StoppedBySignal(self._receiver.signum) from exception

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        signum = self._receiver.signum if self._receiver else None
        self._close()
        if signum is not None:  # it came so late that the run has ended by itself
            raise StoppedBySignal(signum)

    def _close(self) -> None:
        watch_forks(of_a_run=False)
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


def _all_steps_are_made(trainer: Trainer) -> bool:
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return last_epoch and trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def _await(processes: list[Any]) -> None:
    """Be the last to end, so that a shell is back when all is done; the receiver sees to it that this has an end."""
    for process in processes:
        process.wait()


def _is_ours(handler: Any) -> bool:
    return isinstance(getattr(handler, "__self__", None), SignalReceiver)
