"""Many runs: ``sweep`` searches settings, ``compare`` compares optimizers after the same tuning of each.

Runs are started by the command line of the project and read by :mod:`lightning_muon.report`; this room needs neither
torch nor Lightning.

- ``trial``: a run of a study, and its result
- ``study``: many runs, taken from one journal by any number of workers
- ``journal``: that journal, the only state of a study; ``workers``: which of them are alive, by ``locks``
- ``space``: choices and ranges of keys; ``search``: suggestions by Optuna; ``sweep``: a study of these
- ``runs``: the process of a run; ``outcome``: what came of it
"""

from lightning_muon.experiments.journal import Record
from lightning_muon.experiments.locks import StudyError
from lightning_muon.experiments.study import Plan, StudyStopped, print_result, run_study
from lightning_muon.experiments.trial import Result, Trial

__all__ = ["Plan", "Record", "Result", "StudyError", "StudyStopped", "Trial", "print_result", "run_study"]
