"""How long a run is: epochs or steps, whichever was asked for last; and schedules of that length."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LRScheduler

from lightning_muon.callbacks.hyperparameter_schedule import steps_of_run
from lightning_muon.cli.given import Given, place_of
from lightning_muon.cli.output import say

# The limits of a run, and how each is lifted.
_LIMITS = {"trainer.max_steps": "-1", "trainer.max_epochs": "null"}
# A negative number is no limit, or a mistake that is told later.
_IS_LIMIT = re.compile(r"\d+|\$\{.*")


def lift_limit(given: Sequence[Given], *, quiet: bool = False) -> list[str]:
    """Lift the limit of a run that was given before the other one, and say so.

    Who writes ``--trainer.max_epochs 3`` wants three epochs, whatever ``trainer.max_steps`` a config file has. Where
    both were given in one place, both apply: the run ends at whichever comes first.

    Args:
        given: What the user gave.
        quiet: Say nothing.

    Returns:
        The option that lifts it, if there is one to lift.
    """
    last: dict[str, tuple[int, Given]] = {}
    for position, entry in enumerate(given):
        if entry.key in _LIMITS:
            last[entry.key] = position, entry
    set_ones = [(at, entry) for at, entry in last.values() if _IS_LIMIT.fullmatch(str(entry.value))]
    if len(set_ones) < len(_LIMITS):
        return []
    (_, lifted), (_, asked) = sorted(set_ones, key=lambda found: found[0])
    if (lifted.file, lifted.asked) == (asked.file, asked.asked):
        return []
    if not quiet:
        line = f"{asked.key} {asked.value} ends the run: {lifted.key} {lifted.value} does not apply"
        say(f"{line}{place_of(lifted.key, given)}")
    return [f"--{lifted.key}={_LIMITS[lifted.key]}"]


class ScheduleOfRun:
    """Makes learning-rate schedules; those with an argument ``total_steps`` get the length of the run unless given.

    Args:
        trainer: Returns the trainer.
    """

    def __init__(self, trainer: Callable[[], Trainer]) -> None:
        self.trainer = trainer

    def __call__(self, schedule: type[LRScheduler], *args: Any, **options: Any) -> LRScheduler:
        """Return a schedule of a class.

        Raises:
            ValueError: If it needs the length of the run, and that is not known.
        """
        takes_length = "total_steps" in inspect.signature(schedule).parameters and len(args) < 2
        # As OneCycleLR has them.
        has_length = options.get("total_steps") is not None or options.get("epochs") is not None
        if takes_length and not has_length:
            steps = steps_of_run(self.trainer())
            if steps is None:
                raise ValueError(
                    f"model.lr_scheduler: {schedule.__name__} needs the length of the run, and neither steps nor epochs"
                    " limit it: give --trainer.max_steps, or --model.lr_scheduler.total_steps"
                )
            options["total_steps"] = steps
        return schedule(*args, **options)
