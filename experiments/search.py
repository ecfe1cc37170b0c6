"""Suggestions by Optuna: what to try next, and which runs to end early.

Optuna keeps no state here: its study is made anew from the records of the journal, for each suggestion.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_muon.experiments.journal import Record
from lightning_muon.experiments.locks import StudyError
from lightning_muon.experiments.space import Choices, Dimension, named, shortened
from lightning_muon.experiments.trial import Trial

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_TRIES = 10  # for a suggestion that was not tried yet, where there are only choices
_LEAST_TRIALS = 4  # that have ended before the first run is ended early


def require_optuna() -> None:
    """Import Optuna.

    Raises:
        StudyError: If it is not installed.
    """
    try:
        import optuna  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise StudyError("--trials and --prune need Optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Search:
    """Suggests trials by a tree-structured Parzen estimator (TPE), which prefers what is near the good ones.

    The first ten are drawn at random. A suggestion depends only on the trials before it.

    Args:
        space: What to vary.
        trials: How many there are in all.
        maximize: Whether the metric is to be large.
    """

    def __init__(self, space: Sequence[Dimension], trials: int, *, maximize: bool) -> None:
        self.space = {dimension.key: dimension for dimension in space}
        self.trials = trials
        self.maximize = maximize

    def __call__(self, records: Sequence[Record]) -> list[Trial]:
        """Return the next trial; none if there are enough, or if all choices were tried."""
        from optuna.samplers import TPESampler  # noqa: PLC0415

        if len(records) >= self.trials:
            return []
        tried = [record.trial.options for record in records]
        for attempt in range(_TRIES):
            seed = len(records) + attempt * 10_000
            study = self._study(records, sampler=TPESampler(seed=seed, constant_liar=True))
            asked = study.ask({key: _distribution(dimension) for key, dimension in self.space.items()})
            options = {key: _value(dimension, asked.params[key]) for key, dimension in self.space.items()}
            if options not in tried:
                return [named(options, {record.trial.name.casefold() for record in records})]
        return []

    def should_prune(self, records: Sequence[Record], curve: Sequence[tuple[int, float]]) -> bool:
        """Return whether a run is worse so far than half of those that have come to their end were at this step."""
        from optuna.pruners import MedianPruner  # noqa: PLC0415
        from optuna.trial import TrialState, create_trial  # noqa: PLC0415

        study = self._study([record for record in records if record.state == "finished"])
        study.add_trial(create_trial(state=TrialState.RUNNING, intermediate_values=dict(curve)))
        pruner = MedianPruner(n_startup_trials=_LEAST_TRIALS)
        return pruner.prune(study, study.get_trials(deepcopy=False)[-1])

    def _study(self, records: Sequence[Record], **options: Any) -> "optuna.Study":
        import optuna  # noqa: PLC0415

        study = optuna.create_study(direction="maximize" if self.maximize else "minimize", **options)
        distributions = {key: _distribution(dimension) for key, dimension in self.space.items()}
        for record in records:
            study.add_trial(self._as_optuna_has_it(record, distributions))
        return study

    def _as_optuna_has_it(
        self, record: Record, distributions: Mapping[str, "BaseDistribution"]
    ) -> "optuna.trial.FrozenTrial":
        from optuna.trial import TrialState, create_trial  # noqa: PLC0415

        result, value = record.result, None
        if result is None:
            state = TrialState.RUNNING
        elif result.status == "pruned":
            state = TrialState.PRUNED
        else:
            # What diverges or fails is to be avoided.
            state, worst = TrialState.COMPLETE, float("-inf" if self.maximize else "inf")
            value = result.value if result.status == "finished" and result.value is not None else worst
        return create_trial(
            state=state,
            value=value,
            params={key: _parameter(dimension, record.trial.options[key]) for key, dimension in self.space.items()},
            distributions=dict(distributions),
            intermediate_values=dict(record.curve),
        )


def _distribution(dimension: Dimension) -> "BaseDistribution":
    from optuna.distributions import (  # noqa: PLC0415
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(dimension, Choices):  # by their places: values of a configuration may be of any kind
        return CategoricalDistribution(list(range(len(dimension.values))))
    if dimension.is_of_integers:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _value(dimension: Dimension, parameter: Any) -> Any:
    if isinstance(dimension, Choices):
        return dimension.values[parameter]
    if dimension.is_of_integers:
        return int(parameter)
    return min(max(shortened(parameter), dimension.low), dimension.high)


def _parameter(dimension: Dimension, value: Any) -> Any:
    return list(dimension.values).index(value) if isinstance(dimension, Choices) else value
