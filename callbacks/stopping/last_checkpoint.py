"""Save a run that ends early, where ``ckpt_path="last"`` finds it, so that it resumes exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging


def save_last(trainer: Trainer, *, goes_on: bool = False) -> str | None:
    """Save the run as the last checkpoint of its ``ModelCheckpoint``; a collective.

    Its name is that of ``save_last=True``, whether this is set or not: ``last.ckpt`` beside the other checkpoints. An
    earlier one of the same run is replaced; one of another run stays, and ``last-v1.ckpt`` is written beside it.

    Args:
        trainer: The trainer, in training.
        goes_on: Whether the run does not end yet. Its ``ModelCheckpoint`` then saves this step once more where it would
            have done so: it may have a better metric by then.

    Returns:
        The path; ``None`` if the run saves no checkpoints, for lack of a ``ModelCheckpoint`` that saves all of the
        state, or because of ``fast_dev_run``.
    """
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    callbacks = [callback for callback in callbacks if not callback.save_weights_only]
    if not callbacks or getattr(trainer, "fast_dev_run", False):
        return None
    callback = next((callback for callback in callbacks if callback.save_last), callbacks[0])
    save_last, saved_at = callback.save_last, callback._last_global_step_saved
    if save_last == "link" and trainer.is_global_zero and Path(callback.last_model_path).is_symlink():
        Path(callback.last_model_path).unlink()  # what it leads to stays, and is not written over
    callback.save_last = True
    try:
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
        # Until it is on the disk: an asynchronous save goes on after the call, and the process is about to end.
        trainer.strategy.checkpoint_io.teardown()
        trainer.strategy.barrier()
    finally:
        callback.save_last = save_last
    if goes_on:
        callback._last_global_step_saved = saved_at
    return callback.last_model_path


@contextmanager
def trained_weights(trainer: Trainer, *, averaged: bool) -> Iterator[None]:
    """Put the weights that are trained into the module, where Lightning's callbacks have put averages for a validation.

    Those callbacks take for averages what is not in the module: a checkpoint from the midst of a validation would have
    the two exchanged.

    Args:
        trainer: The trainer.
        averaged: Whether a validation is under way.
    """
    callbacks = trainer.callbacks if averaged else []  # type: ignore[attr-defined]
    averages = [one for one in callbacks if isinstance(one, WeightAveraging) and one._average_model is not None]
    for callback in averages:
        callback._swap_models(trainer.lightning_module)
    try:
        yield
    finally:
        for callback in averages:
            callback._swap_models(trainer.lightning_module)


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the step that has just been made."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher)


def validate_after_resuming(trainer: Trainer, loops: dict[str, Any]) -> None:
    """Change the progress in a checkpoint so that the resumed run begins with the validation after the last step.

    Lightning itself would skip a validation that has not begun, and leave out the first batches of one that has. The
    best checkpoints and the schedules that follow a metric would not be those of an uninterrupted run.

    Args:
        trainer: The trainer, after a step, or in the validation after it.
        loops: The state of its fit loop, which is changed in place.
    """
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return  # then the clock decides, not the step
    step = loops["epoch_loop.batch_progress"]
    for count in ("total", "current"):
        step[count]["completed"] = step[count]["processed"]
    # As in the first batch of the validation, before it is processed. The total counts the epoch's validations so far.
    validation = loops["epoch_loop.val_loop.batch_progress"]
    before = validation["total"]["completed"] - (validation["current"]["completed"] if trainer.validating else 0)
    validation["total"] = {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}
    validation["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["is_last_batch"] = False


def restart_validation_count(trainer: Trainer) -> None:
    """Take back the batch that :func:`validate_after_resuming` has counted; called when that validation begins."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop.restarted_mid_evaluation:
        loop.batch_progress.total.reset_on_restart()


def end_of_restart(trainer: Trainer) -> None:
    """Let the epoch in which a run resumes end as any other; called once something has been done in it.

    Lightning takes the whole epoch for a restart, and leaves out what ``ReduceLROnPlateau`` does at its end.
    """
    trainer.fit_loop._restarting = False
