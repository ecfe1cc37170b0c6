"""What a comparison runs: the same tuning of each optimizer, then paired seeds at the full length and at shorter ones.

Every run goes to the end of a schedule of its own length. A loss that is read off the middle of a longer run is higher
than what the optimizer reaches in as many steps, because the learning rate has not come down.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_muon.experiments.contestant import Contestant, Settings
from lightning_muon.experiments.journal import Record
from lightning_muon.experiments.outcome import Setting
from lightning_muon.experiments.trial import Result, Trial
from lightning_muon.experiments.tuning import ALL_AXES, Search, axes_of, search

# Of the full length. A factor of √2 between neighbours: the curve of losses over steps is nearly straight there.
HORIZONS = (1.0, 1 / math.sqrt(2), 0.5)
Known = Mapping[str, Result | None]  # results by the names of trials; None while one is running

# A contestant gets shorter runs until they are clearly worse than the baseline's at full length, or this short: only
# then does its curve say with an interval where the two are equal.
SHORTEST = 0.25
# Standard errors; the two-sided 95 % quantile of Student's t for four values is 3.18.
CLEARLY = 3.0


@dataclass(frozen=True)
class Protocol:
    """The runs of a comparison.

    Args:
        contestants: Those that take part; the first one is the baseline.
        steps: The full length, in steps of the optimizer.
        accumulate: Batches of a step.
        tuning_seed: Of the runs that tune. The others have other seeds: the best of many runs with one seed is partly
            luck, which is not to count.
        seeds: Of the runs that are compared. Runs with one seed start from the same weights and see the same data.
        tuned: Axes of the tuning, see :func:`~lightning_muon.experiments.tuning.axes_of`.
        setting: What all runs have in common.
    """

    contestants: tuple[Contestant, ...]
    steps: int
    accumulate: int
    tuning_seed: int
    seeds: tuple[int, ...]
    tuned: tuple[str, ...] = ALL_AXES
    setting: Setting = field(default_factory=Setting)

    @property
    def baseline(self) -> Contestant:
        """The optimizer with which the others are compared."""
        return self.contestants[0]

    def plan(self, records: Sequence[Record]) -> list[Trial]:
        """Return the trials that can run now, and have no record."""
        known = {record.trial.name: record.result for record in records}
        wanted = [trial for contestant in self.contestants for trial in self._wanted(contestant, known)]
        # By name, because a short length may be asked for twice.
        return [trial for name, trial in {trial.name: trial for trial in wanted}.items() if name not in known]

    def tuning(self, contestant: Contestant, known: Known) -> Search:
        """Return how far the tuning of a contestant has come."""

        def loss_of(settings: Settings) -> float | None:
            result = known.get(self.trial(contestant, settings, self.steps, self.tuning_seed).name)
            return None if result is None else result.loss

        return search(contestant, axes_of(contestant, self.tuned), loss_of)

    def horizons(self, contestant: Contestant, known: Known) -> list[int]:
        """Return the lengths of the final runs of a contestant that are known to be needed so far, the longest first.

        The baseline needs all of them, for contestants that are worse. A contestant needs shorter runs if it is better.
        """
        lengths = [self._length(part) for part in HORIZONS]
        if contestant == self.baseline:
            return lengths
        above = self._above(contestant, self.steps, known)
        if above is None or above > 0:
            return lengths[:1]
        while (above := self._above(contestant, lengths[-1], known)) is not None and above < CLEARLY:
            if lengths[-1] <= self._length(SHORTEST):
                break
            lengths.append(max(self._length(SHORTEST), round(lengths[-1] / math.sqrt(2))))
        return lengths

    def final_results(self, contestant: Contestant, steps: int, known: Known) -> dict[int, Result]:
        """Return the results of a contestant's final runs of a length that have ended, by seed."""
        tuning = self.tuning(contestant, known)
        if tuning.wanted:
            return {}
        names = {seed: self.trial(contestant, tuning.best, steps, seed).name for seed in self.seeds}
        return {seed: result for seed, name in names.items() if (result := known.get(name)) is not None}

    def trial(self, contestant: Contestant, settings: Settings, steps: int, seed: int) -> Trial:
        """Return the run of a contestant with given settings, length and seed."""
        options = {
            "config": list(contestant.configs),
            **settings.options(),
            "seed_everything": seed,
            "trainer.max_steps": steps,
            # Once, at the end: all that counts is the loss there, wherever in an epoch it is.
            "trainer.val_check_interval": steps * self.accumulate,
            "trainer.check_val_every_n_epoch": None,
        }
        return Trial(f"{contestant.name},{settings},steps={steps},seed={seed}", options)

    def _wanted(self, contestant: Contestant, known: Known) -> list[Trial]:
        tuning = self.tuning(contestant, known)
        if tuning.wanted:
            return [self.trial(contestant, settings, self.steps, self.tuning_seed) for settings in tuning.wanted]
        return [
            self.trial(contestant, tuning.best, steps, seed)
            for steps in self.horizons(contestant, known)
            for seed in self.seeds
        ]

    def _above(self, contestant: Contestant, steps: int, known: Known) -> float | None:
        """Return how far a contestant's loss at a length is above the baseline's at full length, in standard errors.

        ``None`` until all runs have ended.
        """
        own = self.final_results(contestant, steps, known)
        baseline = self.final_results(self.baseline, self.steps, known)
        if min(len(own), len(baseline)) < len(self.seeds):
            return None
        differences = [own[seed].loss - baseline[seed].loss for seed in self.seeds]
        if not all(map(math.isfinite, differences)):
            return math.inf
        mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
        return math.copysign(math.inf, mean) if deviation == 0 else mean / deviation * math.sqrt(len(differences))

    def _length(self, part: float) -> int:
        return max(1, round(self.steps * part))
