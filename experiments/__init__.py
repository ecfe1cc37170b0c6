"""Many runs: ``sweep`` searches settings, ``compare`` compares optimizers after the same tuning of each.

Runs are started by the command line of the project and read by :mod:`lightning_muon.report`; this room needs neither
torch nor Lightning.

- ``trial``: a run of a study, and its result
"""

from lightning_muon.experiments.trial import Result, Trial

__all__ = ["Result", "Trial"]
