"""A run of a study, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["finished", "diverged", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """A run that a study asks for.

    Args:
        name: Unique in the study, and fit to be the name of a folder; what tells the run apart in TensorBoard.
        options: What it sets, over the command line that all runs of the study share: values, as YAML has them, by
            their keys in the configuration of ``fit``, such as ``model.optimizer.init_args.lr``. The key ``config`` may
            have a list of config files or names of presets.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What came of a trial; plain values, as JSON has them.

    Args:
        status: ``diverged`` if the metric or the loss was not finite, or the run was stopped for it; ``pruned`` if the
            study ended it early; ``failed`` if the program ended with another error.
        value: The metric at the end of the run; ``None`` if there is none.
        steps: The last step of the optimizer.
        seconds_per_step: The median over the run.
        verdict: Of the monitors: ``ok``, ``watch``, ``bad``, ``not measured`` or ``too short to judge``.
        figures: Further final values of the run, by tag.
        message: What went wrong; empty if nothing did.
    """

    status: Status
    value: float | None = None
    steps: int = 0
    seconds_per_step: float | None = None
    verdict: str = "not measured"
    figures: Mapping[str, float] = field(default_factory=dict)
    message: str = ""

    @property
    def loss(self) -> float:
        """The value to be minimized, infinite unless the run finished."""
        return self.value if self.status == "finished" and self.value is not None else float("inf")
