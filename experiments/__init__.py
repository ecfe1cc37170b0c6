"""Many runs: ``sweep`` searches settings, ``compare`` compares optimizers after the same tuning of each.

Runs are started by the command line of the project and read by :mod:`lightning_muon.report`; this room needs neither
torch nor Lightning.

- ``trial``: a run of a study, and its result
- ``study``: many runs, taken from one journal by any number of workers
- ``journal``: that journal, the only state of a study; ``workers``: which of them are alive, by ``locks``
- ``runs``: the process of a run; ``measured``: what came of it; ``hparams``: its row in TensorBoard's table
- ``sweep``: a study over settings; ``space``: choices and ranges of keys; ``search``: suggestions by Optuna
- ``compare``: a study of optimizers; ``contestant``: one of them; ``tuning``: its search; ``protocol``: all its runs
- ``outcome``: what came of a comparison; ``ratio``: steps for the same loss, with an interval; ``standings``: how the
  optimizers stand; ``output``: tables and files; ``plots``
"""

from lightning_muon.experiments.journal import Record
from lightning_muon.experiments.locks import StudyError
from lightning_muon.experiments.study import Plan, StudyStopped, print_result, run_study
from lightning_muon.experiments.trial import Result, Trial

__all__ = ["Plan", "Record", "Result", "StudyError", "StudyStopped", "Trial", "print_result", "run_study"]
