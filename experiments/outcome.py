"""What came of a comparison: the runs of each optimizer, as plain values that JSON keeps."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_muon.experiments.trial import Result, Status


class OutcomeFileError(ValueError):
    """A file is not an outcome; the message is one line for the user."""


@dataclass(frozen=True)
class TuningRun:
    """A run that served to find settings.

    Args:
        stage: What was tuned: ``lr``, ``weight_decay``, or a role.
        settings: All that is tuned, by name: ``lr``, ``weight_decay``, and the learning rates of roles.
        status: As in :class:`Result`.
        value: The metric at the end of the run; ``None`` if there is none.
    """

    stage: str
    settings: Mapping[str, float]
    status: Status
    value: float | None = None

    @property
    def loss(self) -> float:
        """The value; infinite unless the run finished with a finite one."""
        return _loss(self.status, self.value)


@dataclass(frozen=True)
class FinalRun:
    """A run with the settings that were found, to the end of a schedule of so many steps.

    Args:
        horizon: The steps of the schedule.
        seed: Runs of one seed start from the same weights and read the same data, whatever their optimizer.
        result: What came of it.
    """

    horizon: int
    seed: int
    result: Result

    @property
    def loss(self) -> float:
        """The loss at the end; infinite unless the run finished with a finite one."""
        return _loss(self.result.status, self.result.value)

    @property
    def finished(self) -> bool:
        """Whether the run has a loss at its end."""
        return math.isfinite(self.loss)

    @property
    def diverged(self) -> bool:
        """Whether the loss was not finite. Of a run that failed for another reason nothing is known."""
        value = self.result.value
        return self.result.status == "diverged" or (value is not None and not math.isfinite(value))


@dataclass(frozen=True)
class Finalist:
    """An optimizer with the settings that its tuning found.

    Args:
        name: As in the tables.
        settings: By name: ``lr``, ``weight_decay``, and the learning rates of roles.
        tuning: The runs of the tuning, in their order.
        runs: The final runs.
        at_edge: Settings whose best value is the first or last that was tried: a better one may lie beyond.
        state_bytes: Of the optimizer's state, in all, with the parameters whole; ``None`` if it was not measured.
    """

    name: str
    settings: Mapping[str, float]
    tuning: tuple[TuningRun, ...] = ()
    runs: tuple[FinalRun, ...] = ()
    at_edge: tuple[str, ...] = ()
    state_bytes: int | None = None

    def at(self, horizon: int) -> dict[int, FinalRun]:
        """Return the final runs of a horizon, by seed."""
        return {run.seed: run for run in self.runs if run.horizon == horizon}


@dataclass(frozen=True)
class Setting:
    """What all runs had in common, for the sentence above the table.

    Args:
        task: What was trained on what, in a few words: ``a GPT on bytes of English text``.
        metric: The tag of the loss: ``val/loss``.
        parameters: Of the model.
        tokens_per_step: Or samples, if the model has no tokens; ``None`` if it is not known.
        unit: What ``tokens_per_step`` counts.
        device: What the runs ran on, in a few words.
    """

    task: str = ""
    metric: str = "val/loss"
    parameters: int | None = None
    tokens_per_step: int | None = None
    unit: str = "tokens"
    device: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a comparison.

    Args:
        baseline: The name of the finalist that the others are compared with.
        finalists: In any order.
        setting: What all runs had in common.
    """

    baseline: str
    finalists: tuple[Finalist, ...]
    setting: Setting = Setting()

    def __post_init__(self) -> None:
        names = [finalist.name for finalist in self.finalists]
        if len(set(names)) < len(names):
            raise ValueError(f"two finalists have the same name: {', '.join(names)}")
        if self.baseline not in names:
            raise ValueError(f"the baseline '{self.baseline}' is none of {', '.join(names)}")

    def __iter__(self) -> Iterator[Finalist]:
        return iter(self.finalists)

    def __getitem__(self, name: str) -> Finalist:
        return next(finalist for finalist in self.finalists if finalist.name == name)

    @property
    def horizons(self) -> list[int]:
        """The lengths of the final runs in steps, in ascending order."""
        return sorted({run.horizon for finalist in self for run in finalist.runs})

    @property
    def horizon(self) -> int:
        """The longest of them; zero if there are no final runs."""
        return max(self.horizons, default=0)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the final runs."""
        return sorted({run.seed for finalist in self for run in finalist.runs})

    def to_json(self) -> str:
        """Return the outcome as JSON; values that are not finite become ``null``."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """Read what :meth:`to_json` wrote.

        Raises:
            OutcomeFileError: If the text is something else.
        """
        try:
            values = json.loads(text)
            finalists = tuple(_finalist(finalist) for finalist in values["finalists"])
            return cls(values["baseline"], finalists, Setting(**values["setting"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OutcomeFileError(f"this is not the outcome of a comparison: {error!r}") from error


def _loss(status: Status, value: float | None) -> float:
    return value if status == "finished" and value is not None and math.isfinite(value) else math.inf


def _finalist(values: Mapping[str, Any]) -> Finalist:
    def result(of: Mapping[str, Any]) -> Result:
        figures = {tag: math.nan if figure is None else figure for tag, figure in of["figures"].items()}
        return Result(**{**of, "figures": figures})

    runs = (FinalRun(**{**run, "result": result(run["result"])}) for run in values["runs"])
    tuning = (TuningRun(**run) for run in values["tuning"])
    parts = {"tuning": tuple(tuning), "runs": tuple(runs), "at_edge": tuple(values["at_edge"])}
    return Finalist(**{**values, **parts})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
